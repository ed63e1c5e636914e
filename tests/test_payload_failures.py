"""An exception comes back as itself with the worker's traceback, or as a stand-in, and always comes back.

Rows: H15, P1, P3; section 4 of the hazards, row 1.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from fdpool import errors, payload

from .payload_helpers import Lock, Raises, deliver_failure, in_another_process


class Plain(Exception):
    """An exception like most."""


class TwoArguments(Exception):
    """Its constructor wants what its args do not say."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a, self.b = a, b


class Mute(Exception):
    """Neither str() nor repr() of it works."""

    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Stubborn(Exception):
    """Lets no attribute be set."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class NotAnException(Exception):
    """Its pickle makes something else."""

    def __reduce__(self) -> Any:
        return int, (7,)


class Holder(Exception):
    """Holds a file."""

    def __init__(self, text: str, file: Any = None) -> None:
        super().__init__(text)
        self.file = file


def raised(error: BaseException) -> BaseException:
    """`error`, with the traceback of having been raised."""
    try:
        raise error
    except BaseException as caught:
        return caught


def carried(error: BaseException, **limits: int) -> BaseException:
    return deliver_failure(payload.dumps_failure(raised(error), **limits))


# -- as itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        Plain("x", 1),
        ValueError(),
        KeyError("k"),
        FileNotFoundError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"),
        StopIteration(3),
        SystemExit(4),
        KeyboardInterrupt(),
        errors.NotPicklable("x"),
        errors.RemoteError("m", "t", "tb"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_as_itself_with_the_remote_traceback(error: BaseException) -> None:
    got = carried(error)
    assert type(got) is type(error)
    assert got.args == error.args
    assert got.__dict__ == error.__dict__ or got.__dict__.keys() == error.__dict__.keys()
    assert isinstance(got.__cause__, errors.RemoteTraceback)
    assert "in raised\n    raise error\n" in got.__cause__.tb
    assert got.__traceback__ is None


def test_attributes_of_an_exception_come_back() -> None:
    error = Plain("x")
    error.detail = {"more": [1]}  # type: ignore[attr-defined]
    assert carried(error).detail == {"more": [1]}  # type: ignore[attr-defined]


def test_each_load_makes_a_new_instance() -> None:
    sent = payload.dumps_failure(raised(Plain("x")))
    first, second = deliver_failure(sent), deliver_failure(sent)
    assert first is not second
    assert first.args == second.args


def test_the_chain_of_causes_is_kept_as_text() -> None:
    def chained() -> None:
        try:
            {}["missing"]
        except KeyError as cause:
            try:
                raise ValueError("middle") from cause
            except ValueError:
                raise Plain("outer")  # noqa: B904

    try:
        chained()
    except Plain as error:
        got = deliver_failure(payload.dumps_failure(error))
    text = str(got.__cause__)
    assert text.index("KeyError: 'missing'") < text.index("ValueError: middle") < text.index("Plain: outer")
    assert "direct cause" in text
    assert "During handling" in text


def test_an_exception_of_a_local_class_comes_back() -> None:
    class Local(Exception):
        pass

    assert type(carried(Local("x"))).__name__ == "Local"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with 3.11")
def test_notes_are_kept() -> None:
    error, mute = Plain("x"), TwoArguments(1, 2)
    for each in (error, mute):
        each.add_note("while testing")  # type: ignore[attr-defined,unused-ignore]
    assert carried(error).__notes__ == ["while testing"]  # type: ignore[attr-defined,unused-ignore]
    assert "while testing" in carried(mute).__notes__  # type: ignore[attr-defined,unused-ignore]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with 3.11")
def test_a_group_comes_back_whole() -> None:
    group = ExceptionGroup("both", [Plain("a"), ValueError("b")])  # type: ignore[name-defined,unused-ignore] # noqa: F821
    got: Any = carried(group)
    assert [type(each) for each in got.exceptions] == [Plain, ValueError]


def test_a_failure_comes_back_from_another_process(text_file: Path) -> None:
    with open(text_file) as f, pytest.raises(Holder, match="with its file") as e:
        in_another_process(_fail_with_a_file, f)
    with e.value.file as file:
        assert file.readline() == "line 0\n"
    assert "in _fail_with_a_file" in str(e.value.__cause__)


def _fail_with_a_file(file: Any) -> None:
    raise Holder("with its file", file)


@pytest.mark.parametrize("spill_bytes", [100, 65536])
def test_an_exception_with_enormous_arguments_comes_back(spill_bytes: int) -> None:
    """P3."""
    np = pytest.importorskip("numpy")
    got = carried(Plain("x" * 3_000_000, np.arange(100_000)), spill_bytes=spill_bytes)
    assert len(got.args[0]) == 3_000_000
    assert (got.args[1] == np.arange(100_000)).all()


# -- as a stand-in -------------------------------------------------------------------------------------------


def stand_in(error: BaseException) -> errors.RemoteError:
    got = carried(error)
    assert type(got) is errors.RemoteError
    assert isinstance(got.__cause__, errors.RemoteTraceback)
    assert got.traceback == got.__cause__.tb
    return got


def test_an_exception_that_cannot_be_made_again_has_a_stand_in() -> None:
    """P3: the constructor wants other arguments, which breaks other pools for good."""
    got = stand_in(TwoArguments(1, 2))
    assert got.message == "1 and 2"
    assert got.type_name == f"{__name__}.TwoArguments"
    assert str(got) == f"{__name__}.TwoArguments: 1 and 2"
    assert "in raised" in got.traceback
    assert "could not be made again here: TypeError" in got.__notes__[-1]  # type: ignore[attr-defined,unused-ignore]


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (Plain(Lock()), "could not be sent: .*argument 1 of its Plain: .*a Lock stays where it is"),
        (Plain(Raises(ValueError("poison"))), "made again here: ValueError: poison"),
        (Plain(Raises(SystemExit(3))), "made again here: SystemExit: 3"),
        (NotAnException(), "made again here: TypeError: its pickle makes a int"),
    ],
    ids=["unpicklable", "raises", "exits", "wrong type"],
)
def test_the_reason_for_a_stand_in_is_noted(error: BaseException, note: str) -> None:
    """P1, P2."""
    import re

    assert re.search(note, stand_in(error).__notes__[-1])  # type: ignore[attr-defined,unused-ignore]


def test_a_class_that_is_missing_here_has_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = payload.dumps_failure(raised(Plain("x")))
    monkeypatch.delitem(globals(), "Plain")
    got: Any = deliver_failure(sent)
    assert type(got) is errors.RemoteError
    assert got.type_name.endswith(".Plain")


def test_an_exception_that_cannot_be_printed_comes_back() -> None:
    got = carried(Mute())
    assert type(got) is Mute
    assert "in raised" in got.__cause__.tb  # type: ignore[union-attr]


def test_an_exception_whose_attributes_cannot_be_set_still_gets_its_cause() -> None:
    assert isinstance(carried(Stubborn("x")).__cause__, errors.RemoteTraceback)


def test_a_str_subclass_and_lone_surrogates_in_the_message_are_harmless() -> None:
    class Text(str):
        def __reduce__(self) -> Any:
            raise TypeError("not this")

    got: Any = carried(TwoArguments(Text("\ud800"), 2))  # type: ignore[arg-type]
    assert got.message == "\ud800 and 2"


def test_descriptors_of_a_failure_that_cannot_be_made_again_are_closed(text_file: Path) -> None:
    """The leak check is the assertion."""
    with open(text_file) as f, socket.socket() as s:
        assert type(carried(Plain(f, s, Raises(ValueError())))) is errors.RemoteError
        assert type(carried(Plain(f, s, Lock()))) is errors.RemoteError
        assert type(carried(TwoArguments(f, 1))) is errors.RemoteError  # type: ignore[arg-type]


def test_a_report_that_is_no_report_is_a_stand_in() -> None:
    for body in (b"", b"nonsense", payload.dumps(7).body):
        got = payload.loads_failure(body, [os.dup(0)], False)
        assert type(got) is errors.RemoteError
    assert type(payload.loads_failure(b"", [], True)) is errors.RemoteError


def test_without_room_for_a_memory_file_the_report_is_cut_short() -> None:
    """Never fails: no descriptor is left for the memory file of an enormous report."""
    error = raised(Plain("x" * 1_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        sent = payload.dumps_failure(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not sent.spilled
    assert sent.fds is None
    got: Any = deliver_failure(sent)
    assert type(got) is errors.RemoteError
    assert got.type_name.endswith("Plain")
    assert got.message.startswith("xxx")
    assert "Too many open files" in got.__notes__[-1]


# -- nothing is kept (H15) -----------------------------------------------------------------------------------


class Local:
    """Something for a weak reference."""


def test_frames_are_cleared_so_that_their_locals_go() -> None:
    """H15: even while somebody keeps the exceptions."""
    gone: list[weakref.ref[Local]] = []

    def fail() -> None:
        first = Local()
        gone.append(weakref.ref(first))
        try:
            raise ValueError("inner")
        except ValueError:
            second = Local()
            gone.append(weakref.ref(second))
            raise Plain("outer")  # noqa: B904

    try:
        fail()
    except Plain as error:
        kept = error
    sent = payload.dumps_failure(kept)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert kept.__traceback__ is None
    assert kept.__context__ is not None
    assert kept.__context__.__traceback__ is None
    assert "in fail" in str(deliver_failure(sent).__cause__)


def test_an_endless_chain_of_causes_ends() -> None:
    a, b = raised(Plain("a")), raised(Plain("b"))
    a.__cause__, b.__cause__ = b, a
    assert isinstance(deliver_failure(payload.dumps_failure(a)), Plain)
    a.__cause__ = b.__cause__ = None


class Lookup(Exception):
    """As of some client libraries: an attribute that is not there is looked for elsewhere, and that fails otherwise."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_an_exception_that_raises_when_it_is_looked_into_is_told_as_it_is() -> None:
    told = deliver_failure(payload.dumps_failure(raised(Lookup("why"))))
    assert type(told) is Lookup
    assert told.args == ("why",)
