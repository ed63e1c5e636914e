"""Objects become payloads and objects again; what fails, fails at the right end, by name, and leaks nothing.

Rows: H1, H2, H8, H12, H13, P1, P2, P32.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import gc
import importlib
import io
import itertools
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdpool import errors, payload
from fdpool._encoder import Encoder
from fdpool._placement import current
from fdpool.fds import Fd, take_and_close

from .payload_helpers import (
    Boom,
    Lock,
    Raises,
    deliver,
    in_another_process,
    roundtrip,
    same_description,
)


def work(a: Any = None, b: Any = None, **more: Any) -> Any:
    return a, b, more


@dataclasses.dataclass
class Job:
    name: str
    target: Any


class Node:
    """A plain object with attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


# -- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        -1,
        2**100,
        3.5,
        "text",
        "\ud800",
        b"bytes",
        bytearray(b"x"),
        [],
        {},
        (1, [2]),
        {1, 2},
        print,
        Node,
    ],
    ids=repr,
)
def test_a_value_arrives_equal(value: object) -> None:
    sent = payload.dumps(value)
    assert not sent.spilled
    assert sent.fds is None
    assert deliver(sent) == value


def test_a_call_arrives_as_function_args_and_kwargs() -> None:
    fn, args, kwargs = deliver(payload.dumps_call(work, (1, "two"), {"c": 3}))
    assert (fn, args, kwargs) == (work, (1, "two"), {"c": 3})


def test_lambdas_closures_and_local_classes_arrive() -> None:
    factor = 3

    class Local:
        value = 5

    assert roundtrip(lambda x: x * factor)(2) == 6
    assert roundtrip(Local)().value == 5


def test_what_is_in_main_travels_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def probe(): return 'from main'", namespace)
    monkeypatch.setattr(sys.modules["__main__"], "probe", namespace["probe"], raising=False)
    sent = payload.dumps(namespace["probe"])
    monkeypatch.undo()
    assert deliver(sent)() == "from main"


def _module(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder.joinpath(f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


def test_a_module_registered_by_value_travels_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(tmp_path, "registered_by_value", "def probe(): return 'by value'\n", monkeypatch)
    cloudpickle.register_pickle_by_value(module)
    try:
        sent = payload.dumps(module.probe)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    monkeypatch.delitem(sys.modules, "registered_by_value")
    monkeypatch.undo()
    assert deliver(sent)() == "by value"


def test_code_that_travels_by_value_names_its_file() -> None:
    def outer() -> CodeType:
        return (lambda: None).__code__

    there = deliver(payload.dumps(outer))
    assert (there.__code__.co_filename, there().co_filename) == (__file__, __file__)


def test_a_missing_module_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(tmp_path, "not_over_there", "def probe(): pass\n", monkeypatch)
    sent = payload.dumps(module.probe)
    monkeypatch.undo()
    sys.modules.pop("not_over_there")
    with pytest.raises(
        errors.NotLoadable, match=r"ModuleNotFoundError.*'not_over_there'.*register_pickle_by"
    ) as e:
        deliver(sent)
    assert isinstance(e.value.__cause__, ModuleNotFoundError)


def test_a_function_that_its_module_does_not_have_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(tmp_path, "older_over_there", "def probe(): pass\n", monkeypatch)
    sent = payload.dumps(module.probe)
    del module.probe
    with pytest.raises(errors.NotLoadable, match=r"'probe'.*'older_over_there'"):
        deliver(sent)
    sys.modules.pop("older_over_there")


def test_a_reducer_registered_with_copyreg_is_used_from_then_on() -> None:
    class Registered:
        pass

    Registered.__qualname__ = "nowhere.to.be.found"
    before = len(payload.dumps(int).body)
    copyreg.pickle(Registered, lambda _: (int, ("7",)))
    try:
        assert roundtrip(Registered()) == 7
    finally:
        del copyreg.dispatch_table[Registered]
    with pytest.raises(errors.FdpoolError):
        payload.dumps([Registered(), Lock()])
    assert len(payload.dumps(int).body) == before


def test_nothing_of_a_pickled_object_is_kept() -> None:
    node = Node(text="x")
    gone = weakref.ref(node)
    payload.dumps([node])
    del node
    gc.collect()
    assert gone() is None


def test_threads_pickle_at_once_without_mixing(tmp_path: Path) -> None:
    wrong: list[object] = []

    def many(number: int) -> None:
        path = tmp_path / f"{number}"
        with open(path, "w+") as file:
            file.write(f"{number}")
            for _ in range(100):
                name, copy = roundtrip((number, file))
                with copy:
                    copy.seek(0)
                    if (name, copy.read()) != (number, f"{number}"):
                        wrong.append(number)

    threads = [threading.Thread(target=many, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_importing_payload_leaves_the_expensive_modules_alone() -> None:
    expensive = "dataclasses multiprocessing ssl asyncio cloudpickle traceback"
    code = f"import sys, fdpool.payload\nprint([n for n in {expensive!r}.split() if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_plain_call_does_not_import_cloudpickle() -> None:
    code = (
        "import sys, os, fdpool.payload as p\n"
        "with open(os.devnull) as f: p.dumps_call(len, (f, [1]), {}).close()\n"
        "print('cloudpickle' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# -- descriptors, wherever they are ---------------------------------------------------------------------


def test_descriptors_are_found_wherever_they_hide(text_file: Path) -> None:
    """H13."""
    with open(text_file) as f:
        closure = lambda: f  # noqa: E731
        places: list[tuple[Any, Any]] = [
            ([1, [f]], lambda got: got[1][0]),
            ({"deep": {"er": (f,)}}, lambda got: got["deep"]["er"][0]),
            (Job("job", f), lambda got: got.target),
            (Node(inner=Node(file=f)), lambda got: got.inner.file),
            (SimpleNamespace(file=f), lambda got: got.file),
            (functools.partial(work, f, b=2), lambda got: got.args[0]),
            (functools.partial(work, b=f), lambda got: got.keywords["b"]),
            (closure, lambda got: got()),
        ]
        for obj, find in places:
            sent = payload.dumps(obj)
            assert sent.fds is not None
            assert len(sent.fds) == 1, f"{obj} sent its file more than once"
            got = deliver(sent)
            with find(got) as copy:
                assert same_description(f.fileno(), copy.fileno())


def test_a_keyword_argument_and_a_default_may_be_a_file(text_file: Path) -> None:
    """H13."""
    with open(text_file) as f:

        def uses_default(file: Any = f) -> Any:
            return file

        fn, _, kwargs = deliver(payload.dumps_call(uses_default, (), {"file": f}))
        with kwargs["file"] as given:
            assert fn() is given, "the same file twice in one call is one file there"


def test_the_same_object_twice_is_one_descriptor_and_one_object(text_file: Path) -> None:
    """H8."""
    with open(text_file) as f:
        sent = payload.dumps([f, f, {"again": f}])
        assert sent.fds is not None
        assert len(sent.fds) == 1
        a, b, c = deliver(sent)
        assert a is b is c["again"]
        a.close()


def test_a_file_and_its_buffer_stay_one_file(text_file: Path) -> None:
    """H8."""
    with open(text_file) as f:
        text, buffer, raw = roundtrip((f, f.buffer, f.buffer.raw))
        assert text.buffer is buffer
        assert buffer.raw is raw
        text.close()


def test_two_handles_of_one_number_are_two_descriptors(text_file: Path) -> None:
    """H8: each is closed by itself."""
    with open(text_file) as f:
        a, b = roundtrip((Fd(f), Fd(f)))
        assert a.fileno() != b.fileno()
        a.close()
        assert os.pread(b.fileno(), 4, 0) == b"line"
        b.close()
        assert f.readline() == "line 0\n"


def test_one_file_may_be_in_two_tasks(text_file: Path) -> None:
    """H8."""
    with open(text_file) as f:
        one, other = payload.dumps(f), payload.dumps(f)
        with deliver(one) as a, deliver(other) as b:
            assert a.readline() == "line 0\n"
            a.seek(a.tell())
            assert same_description(a.fileno(), b.fileno())


def test_what_is_sent_is_the_file_of_that_moment_not_of_that_number(tmp_path: Path) -> None:
    """H2, P32: a number closed and reused after `dumps` is not what arrives."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("first")
    second.write_text("second")
    fd = os.open(first, os.O_RDONLY)
    sent = payload.dumps(Fd(fd))
    os.close(fd)
    impostor = os.open(second, os.O_RDONLY)
    assert impostor == fd
    try:
        with deliver(sent) as handle:
            assert os.read(handle.fileno(), 10) == b"first"
    finally:
        os.close(impostor)


def test_duplicates_are_close_on_exec_and_above_the_standard_streams() -> None:
    """H12."""
    with roundtrip(Fd(0)) as handle:
        assert handle.fileno() > 2
        assert not os.get_inheritable(handle.fileno())


def test_as_many_descriptors_as_a_message_holds_arrive_in_order() -> None:
    pipes = [os.pipe() for _ in range(126)]
    fds = [fd for pair in pipes for fd in pair]
    try:
        handles = roundtrip([Fd(fd) for fd in fds] + [Fd(0)])
        assert len(handles) == 253
        assert [os.fstat(h.fileno()).st_ino for h in handles[:252]] == [os.fstat(fd).st_ino for fd in fds]
        for handle in handles:
            handle.close()
    finally:
        for fd in fds:
            os.close(fd)


def test_one_descriptor_too_many_is_refused_by_the_limits_name() -> None:
    with pytest.raises(errors.PayloadTooLarge, match="more than 253 descriptors") as e:
        payload.dumps([Fd(0) for _ in range(254)])
    assert e.value.may_have_run is False
    with pytest.raises(errors.PayloadTooLarge, match="more than 2 descriptors"):
        payload.dumps([Fd(0) for _ in range(3)], max_fds=2)


def test_the_memory_file_counts_as_a_descriptor() -> None:
    with pytest.raises(errors.PayloadTooLarge, match="need a descriptor too, and 2 is the limit"):
        payload.dumps([Fd(0), Fd(0), b"x" * 1000], max_fds=2, spill_bytes=500)


def test_objects_travel_through_a_real_message_and_back(text_file: Path) -> None:
    """H12: a worker returns what only it has open."""
    r, w = os.pipe()
    os.write(w, b"from the pipe")
    os.close(w)
    with os.fdopen(r, "rb") as pipe, open(text_file) as f:
        got, result = in_another_process(_read_both, pipe, f)
        assert got == (b"from the pipe", "line 0\n")
        with result:
            assert result.read() == "made there"


def _read_both(pipe: io.BufferedReader, file: io.TextIOWrapper) -> Any:
    r, w = os.pipe()
    os.write(w, b"made there")
    os.close(w)
    return (pipe.read(), file.readline()), os.fdopen(r)


_leaves = st.one_of(
    st.integers(), st.text(max_size=5), st.binary(max_size=5), st.sampled_from(["F0", "F1", "F2"])
)
_nested = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(lambda a: Node(inner=a), inner),
    ),
    max_leaves=20,
)


def _fill(shape: Any, replace: Any) -> Any:
    """`shape` with every leaf replaced."""
    if isinstance(shape, list):
        return [_fill(part, replace) for part in shape]
    if isinstance(shape, tuple):
        return tuple(_fill(part, replace) for part in shape)
    if isinstance(shape, dict):
        return {key: _fill(part, replace) for key, part in shape.items()}
    if isinstance(shape, Node):
        return Node(inner=_fill(shape.inner, replace))
    return replace(shape)


def _bare(shape: Any) -> Any:
    """`shape` with plain tuples for nodes, to compare."""
    if isinstance(shape, Node):
        return "node", _bare(shape.inner)
    if isinstance(shape, (list, tuple)):
        return type(shape)(_bare(part) for part in shape)
    return {key: _bare(part) for key, part in shape.items()} if isinstance(shape, dict) else shape


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=_nested, spill_bytes=st.sampled_from([16, 65536]), by_value=st.booleans())
def test_any_nesting_of_containers_and_files_arrives(shape: Any, spill_bytes: int, by_value: bool) -> None:
    read_end, write_end = os.pipe()
    opened: dict[str, Any] = {
        "F0": open(os.devnull, "rb", buffering=0),
        "F1": os.fdopen(read_end),
        "F2": Fd.take(write_end),
    }
    try:
        sent = _fill(shape, lambda leaf: opened.get(leaf, leaf) if isinstance(leaf, str) else leaf)
        got, _ = roundtrip((sent, (lambda: 0) if by_value else None), spill_bytes=spill_bytes)
        made: dict[int, Any] = {}

        def named(leaf: Any) -> Any:
            if not hasattr(leaf, "fileno"):
                return leaf
            made[id(leaf)] = leaf
            here = {os.fstat(f.fileno()).st_ino: name for name, f in opened.items() if type(f) is type(leaf)}
            return here[os.fstat(leaf.fileno()).st_ino]

        assert _bare(_fill(got, named)) == _bare(shape)
        assert len(made) <= 3
        for file in made.values():
            file.close()
    finally:
        for file in opened.values():
            file.close()


# -- nesting ---------------------------------------------------------------------------------------------


class Envelope:
    """Carries another payload, made while pickling and loaded while unpickling."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getstate__(self) -> Any:
        sent = payload.dumps(self.inner)
        return sent.body, [Fd.take(fd) for fd in (sent.fds.detach() if sent.fds else [])], sent.spilled

    def __setstate__(self, state: Any) -> None:
        body, handles, spilled = state
        self.inner = payload.loads(body, [handle.detach() for handle in handles], spilled)


def test_payloads_made_and_loaded_within_payloads_keep_to_themselves(text_file: Path) -> None:
    with open(text_file) as f, open(os.devnull) as null:
        before, envelope, after = roundtrip((null, Envelope([f, null]), f))
        inner_f, inner_null = envelope.inner
        for got in (before, inner_null):
            assert os.fstat(got.fileno()).st_ino == os.fstat(null.fileno()).st_ino
            got.close()
        for got in (after, inner_f):
            assert same_description(got.fileno(), f.fileno())
            got.close()


# -- what cannot be pickled (P1) --------------------------------------------------------------------------


def _failing_call(*args: Any, **kwargs: Any) -> errors.NotPicklable:
    with pytest.raises(errors.NotPicklable) as e:
        payload.dumps_call(work, args, kwargs)
    assert e.value.__cause__ is not None
    assert e.value.may_have_run is False
    assert isinstance(e.value, pickle.PicklingError)
    return e.value


@pytest.mark.parametrize(
    ("args", "kwargs", "where"),
    [
        ((1, Lock()), {}, "argument 2 ('b') of work(...): <"),
        ((), {"c": Lock()}, "argument 'c' of work(...): <"),
        (({"db": [0, Lock()]},), {}, "argument 1 ('a') of work(...), at ['db'][1]: "),
        ((Job("x", Lock()),), {}, "argument 1 ('a') of work(...), at .target: "),
        ((Node(inner=Node(lock=Lock())),), {}, "argument 1 ('a') of work(...), at .inner.lock: "),
        ((functools.partial(work, 1, Lock()),), {}, "argument 1 ('a') of work(...), at .args[1]: "),
        ((ValueError(Lock()),), {}, "argument 1 ('a') of work(...), argument 1 of its ValueError: "),
    ],
)
def test_the_offending_part_of_a_call_is_named(args: Any, kwargs: Any, where: str) -> None:
    """P1."""
    message = str(_failing_call(*args, **kwargs))
    assert message.startswith(f"cannot pickle {where}")
    assert message.endswith("(Lock): TypeError: a Lock stays where it is")


def test_a_lock_is_named_with_its_type() -> None:
    """P1."""
    message = str(_failing_call(0, threading.Lock()))
    assert "argument 2 ('b') of work(...)" in message
    assert "_thread.lock" in message


def test_what_a_function_closes_over_is_named() -> None:
    """P1."""
    lock = Lock()

    def closing(x: int) -> Any:
        return x, lock

    with pytest.raises(errors.NotPicklable, match=r"the function .*closing, closure variable 'lock': "):
        payload.dumps_call(closing, (1,), {})


def test_a_generator_is_not_picklable_and_is_named() -> None:
    """P1."""
    assert "generator" in str(_failing_call(x for x in [1]))


def test_an_unpicklable_result_is_named_and_may_have_run() -> None:
    """P1."""
    with pytest.raises(errors.NotPicklable, match=r"cannot pickle the result, at \['x'\]: .*Lock") as e:
        payload.dumps_result({"x": Lock()})
    assert e.value.may_have_run is True


def test_an_attribute_that_the_object_leaves_out_is_not_blamed() -> None:
    class Careful:
        def __init__(self) -> None:
            self.left_out, self.kept = Lock(), Lock()

        def __getstate__(self) -> Any:
            return {"kept": self.kept}

    assert ".kept: " in str(_failing_call(Careful()))


def test_a_repr_that_raises_does_not_hide_the_failure() -> None:
    class Mute(Lock):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    assert "argument 1 ('a') of work(...)" in str(_failing_call(Mute()))


def test_a_structure_too_deep_is_not_picklable() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    error = _failing_call(deep)
    assert "argument 1 ('a')" in str(error)
    while deep:  # CPython before 3.12 may overflow the C stack in freeing it at once
        deep = deep.pop()


def test_descriptors_of_a_failed_pass_are_closed(text_file: Path) -> None:
    """P1; the leak check of every test is the assertion."""
    with open(text_file) as f:
        _failing_call(f, Lock())
        roundtrip((f, lambda: 0))[0].close()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_ends_the_program_is_not_swallowed_while_pickling(text_file: Path, error: BaseException) -> None:
    """P1."""
    with open(text_file) as f:
        with pytest.raises(type(error)) as e:
            payload.dumps([f, Boom(error)])
        assert e.value is error
        with roundtrip(f) as again:
            assert again.readline() == "line 0\n"


# -- what cannot be loaded (P2) ----------------------------------------------------------------------------


class Endless:
    """Recurses for ever when unpickled."""

    def __setstate__(self, state: Any) -> None:
        self.__setstate__(state)

    def __getstate__(self) -> Any:
        return {"a": 1}


@pytest.mark.parametrize(
    ("poison", "says"),
    [
        (Raises(ValueError("no thanks")), "ValueError: no thanks"),
        (Raises(MemoryError()), "MemoryError"),
        (Endless(), "RecursionError"),
    ],
    ids=["raises", "memory", "endless"],
)
def test_an_object_that_cannot_be_rebuilt_fails_the_load_and_closes_all(poison: Any, says: str) -> None:
    """P2; built files before and after it are closed too."""
    with open(os.devnull) as f:
        sent = payload.dumps([f, Fd(0), poison, Fd(1)])
        with pytest.raises(errors.NotLoadable, match=says) as e:
            deliver(sent)
        assert e.value.__cause__ is not None
        assert isinstance(e.value, pickle.UnpicklingError)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_what_ends_the_program_is_not_swallowed_while_loading(error: BaseException) -> None:
    """P2."""
    with pytest.raises(type(error)):
        deliver(payload.dumps([Fd(0), Raises(error), Fd(1)]))
    with pytest.raises(type(error)):
        deliver(payload.dumps(Raises(error)))


@pytest.mark.parametrize("body", [b"", b"\x80", b"not a pickle", pickle.dumps([1, 2, 3])[:-3]])
def test_bytes_that_are_no_pickle_are_not_loadable(body: bytes) -> None:
    with pytest.raises(errors.NotLoadable):
        payload.loads(body, [], False)
    with pytest.raises(errors.NotLoadable):
        payload.loads(body, [os.dup(0)], False)


def test_descriptors_that_did_not_come_are_missed() -> None:
    sent = payload.dumps([Fd(0), Fd(0)])
    assert sent.fds is not None
    *fewer, last = sent.fds.detach()
    os.close(last)
    with pytest.raises(errors.NotLoadable, match="names descriptor 1, but 1 came with it"):
        payload.loads(sent.body, fewer, False)
    with pytest.raises(errors.NotLoadable, match="none came with it"):
        payload.loads(sent.body, [], False)


def test_descriptors_that_nothing_names_are_closed() -> None:
    assert payload.loads(payload.dumps("no fds").body, [os.dup(0), os.dup(0)], False) == "no fds"


def test_a_payload_that_is_not_sent_closes_what_it_has() -> None:
    sent = payload.dumps([Fd(0)])
    assert repr(sent) == f"<Payload of {len(sent.body)} bytes and 1 descriptors>"
    sent.close()
    sent.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What other tests have left is not to be collected meanwhile, by functions of ours."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_wherever_a_signal_interrupts_loading_each_descriptor_is_closed_or_still_in_the_callers_list() -> (
    None
):
    """At each call and return of a function of ours: there CPython 3.11 and later run handlers."""

    class Interrupt(BaseException):
        pass

    def interrupting(at: int) -> Any:
        passed = itertools.count(1)

        def trace(frame: FrameType, _event: str, _arg: object) -> Any:
            if "fdpool" not in frame.f_globals["__name__"]:
                return None
            frame.f_trace_lines = False
            if next(passed) == at:
                sys.settrace(None)
                raise Interrupt
            return trace

        return trace

    tracer = sys.gettrace()
    for number in itertools.count(1):
        sent = payload.dumps(b"x" * 100, spill_bytes=10)
        assert sent.fds is not None
        before = len(os.listdir("/proc/self/fd"))
        fds = [*sent.fds.detach(), os.dup(0), os.dup(0)]  # a memory file, and two that nothing names
        sys.settrace(interrupting(number))
        try:
            payload.loads(sent.body, fds, True)
        except Interrupt:
            pass
        else:
            break
        finally:
            sys.settrace(tracer)
        for fd in fds:
            os.fstat(fd)  # not closed yet: it would be closed twice
        take_and_close(fds)
        assert fds == []
        assert current.incoming is None
        assert len(os.listdir("/proc/self/fd")) == before - 1, f"interrupted at point {number}"
    assert number > 10


# -- the system runs out --------------------------------------------------------------------------------


def test_running_out_of_descriptors_is_an_oserror_and_leaks_nothing() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as f:
        handles = [Fd(0) for _ in range(50)]
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                payload.dumps([f, *handles])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for got in roundtrip([f, *handles]):
            got.close()


def test_a_reference_before_a_huge_integer_is_found_and_travels_by_value() -> None:
    """The pickler writes an integer into the frame itself, however long it is."""
    program = """
        from fdpool import payload
        def bits(number): return number.bit_length()
        body = payload.dumps_call(bits, (1 << 8_000_000,), {}, spill_bytes=1 << 30).body
        bits.__qualname__ = "gone"
        del globals()["bits"]
        fn, args, _ = payload.loads(body, [], False)
        print(fn(*args))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("8000001\n", "")


@pytest.mark.parametrize("dump", [payload.dumps_result, lambda value: payload.dumps_call(len, (value,), {})])
def test_a_pickler_that_has_made_something_large_is_not_kept(dump: Any) -> None:
    """Clearing the memo of one that has seen a million strings takes 11 ms, each time."""
    dump("small").close()
    dump("small").close()
    kept = current.outgoing
    assert isinstance(kept, Encoder)
    assert kept.pickler is not None
    pickler = kept.pickler
    dump("small").close()
    assert kept.pickler is pickler
    for size in (4_000, 100_000):
        dump([str(number) for number in range(size)]).close()
        assert kept.pickler is not pickler
        dump("small").close()
        dump("small").close()
