"""Functions that travel by value are pickled once, for as long as nothing has changed that goes with them."""

from __future__ import annotations

import gc
import math
import sys
import textwrap
import types
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Optional

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdpool import _frozen, payload
from fdpool._encoder import pickled_by_value
from tests.modules import run_script
from tests.payload_helpers import deliver, in_another_process

SOURCE = """
import collections
import math

NUMBER = 1
TEXT = "a"
PAIR = (1, (2, "b"))
HELD = []

def inner(value):
    return (value, NUMBER)

def outer(value=0, *, more=5):
    "What it says."
    return inner(value), TEXT, PAIR, more, math.floor(1.5), len("abc")

def uses_list():
    return list(HELD)

def counts():
    global NUMBER
    NUMBER += 1
    return NUMBER

def recurs(n):
    return 1 if n == 0 else n * recurs(n - 1)

def typed(value: "int", other: list[int] | None = None) -> dict[str, float]:
    return {}

def leaves_attribute():
    leaves_attribute.seen = getattr(leaves_attribute, "seen", 0) + 1
    return leaves_attribute.seen

class Own:
    mark = None

THING = Own()

def uses_class():
    return Own.mark

def uses_instance():
    return THING.mark
"""


@pytest.fixture
def main() -> Iterator[Any]:
    """A module that is as `__main__` is to pickle, with functions of its own."""
    module = types.ModuleType("__main__")
    exec(compile(SOURCE, "<program>", "exec"), vars(module))
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield module
    finally:
        sys.modules["__main__"] = before


def send(function: Any, *args: Any) -> Any:
    """The function as it comes out at the other end."""
    return deliver(payload.dumps_call(function, args, {}))[0]


def freeze(function: Any) -> None:
    """Have it travel as often as that takes."""
    for _ in range(3):
        send(function)
    assert _frozen.find(function) is not None


@pytest.mark.parametrize("name", ["inner", "outer", "recurs", "typed", "counts", "leaves_attribute"])
def test_a_function_is_frozen_that_nothing_goes_with_but_what_nobody_changes(main: Any, name: str) -> None:
    function = getattr(main, name)
    send(function)
    assert _frozen.find(function) is None  # it may never be sent again
    freeze(function)
    for _ in range(2):
        made = send(function)
        assert made is not function
        assert (made.__name__, made.__qualname__, made.__module__) == (name, name, "__main__")
        assert (made.__doc__, made.__defaults__) == (function.__doc__, function.__defaults__)
        assert (made.__kwdefaults__, made.__annotations__) == (
            function.__kwdefaults__,
            function.__annotations__,
        )
        assert made.__code__.co_filename == "<program>"
    if name == "outer":
        assert send(function)(7) == function(7)
    if name == "recurs":
        assert send(function)(5) == 120


@pytest.mark.parametrize("name", ["uses_list", "uses_class", "uses_instance"])
def test_what_changes_in_place_is_seen_or_nothing_is_frozen(main: Any, name: str) -> None:
    function = getattr(main, name)
    for number in range(6):
        main.HELD.append(number)
        main.Own.mark = number
        main.THING.mark = number
        for _ in range(4):
            assert send(function)() == (list(range(number + 1)) if name == "uses_list" else number)
        assert (_frozen.find(function) is None) == (name == "uses_instance")


def test_each_task_has_globals_and_attributes_of_its_own(main: Any) -> None:
    freeze(main.counts)
    freeze(main.leaves_attribute)
    for _ in range(3):
        assert send(main.counts)() == 2
        assert send(main.leaves_attribute)() == 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "a global": lambda main: setattr(main, "TEXT", "z"),
    "one of an equal value": lambda main: setattr(main, "TEXT", True) or setattr(main, "TEXT", 1),
    "a global of a function that goes with it": lambda main: setattr(main, "NUMBER", 2),
    "a global that is deleted": lambda main: delattr(main, "TEXT"),
    "a builtin that is hidden": lambda main: setattr(main, "len", str),
    "a global that is a list now": lambda main: setattr(main, "TEXT", ["a"]),
    "a module": lambda main: setattr(main, "math", types.SimpleNamespace(floor=math.ceil)),
    "a function that goes with it": lambda main: setattr(main, "inner", lambda value: value),
    "its code": lambda main: setattr(main.inner, "__code__", (lambda value: "new").__code__),
    "its own code": lambda main: setattr(main.outer, "__code__", (lambda value=0, more=0: "new").__code__),
    "its defaults": lambda main: setattr(main.outer, "__defaults__", (9,)),
    "its keyword's default": lambda main: main.outer.__kwdefaults__.update(more=9),
    "what it says": lambda main: setattr(main.outer, "__doc__", "Else."),
    "its name": lambda main: setattr(main.outer, "__name__", "other"),
    "its qualified name": lambda main: setattr(main.outer, "__qualname__", "A.other"),
    "an attribute": lambda main: setattr(main.outer, "mark", 1),
    "an attribute of one that goes with it": lambda main: setattr(main.inner, "mark", 1),
    "an annotation": lambda main: main.outer.__annotations__.update(value=int),
}


def told(function: Any) -> Any:
    """All that one can see of it, with what it returns."""
    try:
        returned = function(3)
    except Exception as error:
        returned = repr(error)
    names = (
        "__name__",
        "__qualname__",
        "__module__",
        "__doc__",
        "__defaults__",
        "__kwdefaults__",
        "__annotations__",
    )
    inner = function.__globals__.get("inner")
    return (
        returned,
        vars(function),
        vars(inner) if inner else None,
        [getattr(function, name) for name in names],
    )


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_has_changed_goes_with_the_next_task(main: Any, change: str) -> None:
    freeze(main.outer)
    before = told(send(main.outer))
    CHANGES[change](main)
    after = told(send(main.outer))
    assert after == told(cloudpickle.loads(cloudpickle.dumps(main.outer)))
    assert after != before


@given(changes=st.lists(st.sampled_from([*CHANGES, ""]), max_size=12))
def test_after_any_changes_it_is_what_cloudpickle_makes_of_it(changes: list[str]) -> None:
    main = types.ModuleType("__main__")
    exec(compile(SOURCE, "<program>", "exec"), vars(main))
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        for change in changes:
            if change and not (change.startswith("a global that is deleted") and not hasattr(main, "TEXT")):
                CHANGES[change](main)
            expected = told(cloudpickle.loads(cloudpickle.dumps(main.outer)))
            assert told(send(main.outer)) == told(send(main.outer)) == expected
    finally:
        sys.modules["__main__"] = before


def test_what_a_closure_holds_is_looked_at_too() -> None:
    held: Any = 1

    def tell() -> Any:
        return held

    def hold(value: Any) -> None:
        nonlocal held
        held = value

    freeze(tell)
    assert send(tell)() == 1
    hold(2)
    assert send(tell)() == 2
    hold([3])
    for _ in range(4):
        assert send(tell)() == [3]
    held.append(4)
    assert send(tell)() == [3, 4]


def test_two_closures_of_one_code_are_not_mixed_up() -> None:
    def make(number: int) -> Callable[[], int]:
        return lambda: number

    first, second = make(1), make(2)
    for _ in range(4):
        assert (send(first)(), send(second)()) == (1, 2)


def test_a_decorated_function_is_frozen_with_what_it_wraps(main: Any) -> None:
    @wraps(main.inner)
    def wrapper(value: int) -> Any:
        return main_inner(value)

    main_inner = main.inner
    freeze(wrapper)
    assert send(wrapper)(4) == (4, 1)
    main.NUMBER = 6
    assert send(wrapper)(4) == (4, 6)


def test_a_function_that_shares_something_with_an_argument_is_pickled_with_it(main: Any) -> None:
    """Both have the same globals then, as in the program."""
    freeze(main.inner)
    for _ in range(4):
        inner, (counts,), _ = deliver(payload.dumps_call(main.inner, (main.counts,), {}))
        assert counts() == 2
        assert inner(0) == (0, 2)


def test_a_function_that_assigns_to_a_global_shares_it_with_those_that_go_with_it(main: Any) -> None:
    exec("def both():\n    counts()\n    return inner(0)", vars(main))
    for _ in range(4):
        assert send(main.both)() == (0, 2)
    exec("def by_name():\n    globals()['NUMBER'] = 9\n    return inner(0)", vars(main))
    for _ in range(4):
        assert send(main.by_name)() == (0, 9)


CLASSES = """
import dataclasses

SCALE = 1

def outside(x):
    return x * SCALE

class Base:
    held = []
    by_name = {"a": 1}
    unit = "m"
    def __init__(self, x): self.x = x
    def told(self): return outside(self.x), self.unit, list(self.held), dict(self.by_name)
    @property
    def double(self): return 2 * outside(self.x)
    @classmethod
    def made(cls, x): return cls(x)
    @staticmethod
    def scale(): return SCALE

class Sub(Base):
    __slots__ = ("slot",)
    def told(self): return "sub", *super().told()

@dataclasses.dataclass
class Data:
    x: int
    more: list = dataclasses.field(default_factory=list)
    limit: int = 3
    def told(self): return self.x, self.more, self.limit, outside(self.x)
    double = 0
    @classmethod
    def made(cls, x): return cls(x)
    @staticmethod
    def scale(): return SCALE

def told(obj):
    return type(obj).__name__, obj.told(), obj.double, type(obj).scale(), type(obj).made(5).told(), type(obj).__doc__
"""


@pytest.fixture
def classes(main: Any) -> Any:
    exec(compile(CLASSES, "<program>", "exec"), vars(main))
    return main


IN_CLASSES: dict[str, Callable[[Any, int], object]] = {
    "nothing": lambda main, number: None,
    "a global": lambda main, number: setattr(main, "SCALE", number),
    "an attribute": lambda main, number: setattr(main.Base, "unit", f"{number}"),
    "a list": lambda main, number: main.Base.held.append(number),
    "a dictionary": lambda main, number: main.Base.by_name.update(a=number),
    "a method": lambda main, number: setattr(main.Sub, "told", lambda self: number),
    "a base's method": lambda main, number: setattr(
        main.Base, "made", classmethod(lambda cls, x: cls(x + number))
    ),
    "a property": lambda main, number: setattr(main.Base, "double", property(lambda self: number)),
    "a static method": lambda main, number: setattr(main.Data, "scale", staticmethod(lambda: number)),
    "code": lambda main, number: setattr(main.Base.told, "__code__", (lambda self: (7,)).__code__),
    "a name": lambda main, number: setattr(main.Data, "__name__", f"Data{number}"),
    "a default": lambda main, number: setattr(main.Data, "limit", number),
    "what it says": lambda main, number: setattr(main.Data, "__doc__", f"{number}"),
    "a new one": lambda main, number: setattr(main.Sub, "held", [number]),
}


@pytest.mark.parametrize("first", IN_CLASSES)
def test_whatever_changes_in_a_class_goes_with_its_next_instance(first: str, classes: Any) -> None:
    """In a forked child, as this process would find its own classes."""
    objects = [classes.Base(2), classes.Sub(3), classes.Data(4)]
    for number, change in enumerate(("nothing", first, "nothing", "a global", first)):
        IN_CLASSES[change](classes, 10 + number)
        for _ in range(3):
            for obj in objects:
                assert in_another_process(classes.told, obj) == classes.told(obj), (change, number)


def test_a_class_is_frozen_and_the_one_that_arrives_is_the_one_that_came_before(classes: Any) -> None:
    received: list[Any] = []
    obj = classes.Data(1)
    sent = [payload.dumps_call(classes.told, (obj,), {}) for _ in range(5)]
    assert _frozen.find(classes.Data) is not None
    child = _in_child([each.body for each in sent])
    received.extend(child)
    assert received == [(True, classes.told(obj))] * 5


def _in_child(bodies: list[bytes]) -> Any:
    """For each message, whether its class is that of the first one, and what its call returns."""

    def load_all(bodies: list[bytes]) -> list[Any]:
        found: list[Any] = []
        seen: list[Any] = []
        for body in bodies:
            function, (obj,), _ = payload.loads(body, [], False)
            seen.append(type(obj))
            found.append((type(obj) is seen[0], function(obj)))
        return found

    return in_another_process(load_all, bodies)


def test_what_a_receiver_changes_in_a_class_is_gone_with_the_next_instance(classes: Any) -> None:
    sent = [payload.dumps_call(classes.told, (classes.Base(1),), {}) for _ in range(6)]

    def change_each(bodies: list[bytes]) -> list[Any]:
        found = []
        for body in bodies:
            function, (obj,), _ = payload.loads(body, [], False)
            found.append(function(obj))
            type(obj).unit = "changed"
            type(obj).held.append(1)
        return found

    assert (
        in_another_process(change_each, [each.body for each in sent]) == [classes.told(classes.Base(1))] * 6
    )


def test_what_a_receiver_changes_in_a_class_is_gone_for_the_next_function_that_names_it(classes: Any) -> None:
    exec("def names_it(): return Base(1).told(), Data.made(2).told(), outside(3)", vars(classes))
    sent = [payload.dumps_call(classes.names_it, (), {}) for _ in range(6)]
    assert _frozen.find(classes.names_it) is not None

    def change_each(bodies: list[bytes]) -> list[Any]:
        found = []
        for number, body in enumerate(bodies):
            function, _, _ = payload.loads(body, [], False)
            found.append(function())
            if number % 2:
                function.__globals__["Base"].unit = "changed"
                function.__globals__["Data"].told = lambda self: "changed"
            function.__globals__["SCALE"] = 100
        return found

    assert in_another_process(change_each, [each.body for each in sent]) == [classes.names_it()] * 6


def test_an_array_goes_beside_a_frozen_function(main: Any) -> None:
    freeze(main.inner)
    array = np.arange(100_000)
    sent = payload.dumps_call(main.inner, (array,), {})
    assert sent.spilled
    function, (received,), _ = deliver(sent)
    assert (received == array).all()
    assert function(1) == (1, 1)


def test_a_frozen_function_is_not_kept(main: Any) -> None:
    for name in ("inner", "outer", "typed"):
        function = getattr(main, name)
        freeze(function)
        gone = weakref.ref(function)
        delattr(main, name)
        if name == "inner":
            continue  # the other one names it no more, but may not have noticed
        del function
        gc.collect()
        assert gone() is None


def test_no_more_are_kept_than_a_few_hundred() -> None:
    kept = []
    for number in range(_frozen._MOST + 50):
        function = eval(f"lambda: {number}")
        kept.append(function)
        for _ in range(3):
            assert send(function)() == number
        assert len(_frozen._entries) <= _frozen._MOST
        assert len(_frozen._recipes) <= _frozen._MOST_RECIPES
    assert send(kept[0])() == 0


def test_one_that_changes_each_time_is_not_frozen_again_and_again(main: Any) -> None:
    frozen = 0
    for number in range(50):
        main.NUMBER = number
        assert send(main.inner)(0) == (0, number)
        frozen += _frozen._entries[id(main.inner)].frozen is not None
    assert frozen <= 2 * _frozen._MOST_FAILURES
    for number in range(50):  # but one that does so now and then
        main.TEXT = str(number)
        for _ in range(10):
            assert send(main.outer)(0)[1] == str(number)
        assert _frozen.find(main.outer) is not None


def test_modules_that_come_later_are_looked_for(
    main: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """cloudpickle sends submodules along that a function may mean, if they are loaded."""
    package = tmp_path / "comes_later"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("VALUE = 5")
    monkeypatch.syspath_prepend(str(tmp_path))
    exec("import comes_later\ndef value(): return comes_later.part.VALUE", vars(main))
    freeze(main.value)
    exec("import comes_later.part", vars(main))
    sent = payload.dumps_call(main.value, (), {})
    assert b"comes_later.part" in sent.body
    for name in ("comes_later", "comes_later.part"):
        monkeypatch.delitem(sys.modules, name)
    assert deliver(sent)[0]() == 5


def test_modules_that_are_registered_by_value_stay_so(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("registered_one")
    exec("def floor(x): return 'by value'", vars(other))
    monkeypatch.setitem(sys.modules, "registered_one", other)
    main.math = other
    freeze(main.outer)
    cloudpickle.register_pickle_by_value(other)
    try:
        sent = payload.dumps_call(main.outer, (), {})
        assert b"by value" in sent.body
        assert _frozen.find(main.outer) is None
    finally:
        cloudpickle.unregister_pickle_by_value(other)


def test_nothing_in_its_bytes_gives_away_what_travels_by_value(main: Any) -> None:
    data = pickled_by_value(main.outer, True)
    assert b"__main__" in data
    freeze(main.outer)
    sent = payload.dumps_call(main.outer, (1,), {})
    assert b"fdpool._frozen" in sent.body
    assert len(sent.body) < len(data)


def test_functions_of_main_are_as_quick_to_send_as_others_and_do_as_before(tmp_path: Path) -> None:
    """A program as people write them, run twice by each worker and more."""
    code = """
    import fdpool
    from fdpool import _frozen
    FACTOR = 3
    STATE = None
    def helper(x): return x * FACTOR
    def work(x): return helper(x) + 1
    def begin():
        global STATE
        STATE = "set"
    def state(): return STATE
    if True:  # no guard is needed
        with fdpool.Pool(2) as pool:
            assert [pool.submit(work, i).result() for i in range(20)] == [3 * i + 1 for i in range(20)]
            assert _frozen.find(work) is not None
            FACTOR = 4
            assert [pool.submit(work, i).result() for i in range(20)] == [4 * i + 1 for i in range(20)]
            assert list(pool.map(work, range(50))) == [4 * i + 1 for i in range(50)]
        with fdpool.Pool(2, initializer=begin) as pool:
            assert {pool.submit(state).result() for _ in range(20)} == {"set"}
            assert {pool.submit(work, 1).result() for _ in range(20)} == {5}
    print("done")
    """
    done = run_script(tmp_path, textwrap.dedent(code))
    assert (done.stdout, done.stderr) == ("done\n", "")


def annotated(value: Optional[int]) -> Optional[list[str]]:  # noqa: UP045 - as many write it
    return None


def test_usual_annotations_do_not_keep_one_from_being_frozen(main: Any) -> None:
    function = types.FunctionType(annotated.__code__, vars(main), "annotated")
    function.__annotations__ = {"value": Optional[int], "return": Optional[list[str]]}  # noqa: UP045
    freeze(function)
    assert send(function).__annotations__ == function.__annotations__
