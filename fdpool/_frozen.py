"""Functions that travel by value, pickled once for as long as nothing has changed that goes with them.

One of `__main__`, a lambda or a closure takes cloudpickle 15 to 60 µs for each task, where one that has a name in a
module takes 2 µs: a flood of tasks took four times as long. But its pickle depends on more than the function: on the
values of the globals that it names, of its cells, its defaults. So all that is looked at for each task, by identity (2
to 4 µs), and only what nobody can change in place may be among it. Others are pickled anew each time.

Runs in: the client; but `thawed`, where the function is made.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, is_
from types import (
    BuiltinFunctionType,
    CellType,
    EllipsisType,
    FunctionType,
    GenericAlias,
    ModuleType,
    UnionType,
)
from typing import Any

from ._by_value import MAIN, are_shared, names_in, registered_by_value

_MOST = 256  # functions; each holds what goes with it
_LARGEST = 32 * 1024
_WORTH_IT = 4  # tasks; to freeze one takes as long as two of them are spared
_MOST_FAILURES = 3
#: What cloudpickle takes of the globals beside those that a function names.
_ITS_MODULE = ("__package__", "__name__", "__path__", "__file__")
_MAIN = frozenset(MAIN)
_CONSTANT = frozenset([type(None), bool, int, float, complex, str, bytes, range, EllipsisType])
_ATTRIBUTES = attrgetter(
    "__code__",
    "__globals__",
    "__defaults__",
    "__kwdefaults__",
    "__closure__",
    "__name__",
    "__qualname__",
    "__module__",
    "__doc__",
    "__dict__",
    "__annotations__",
)
_CONTENTS = attrgetter("cell_contents")
_NOTHING = object()


class Frozen:
    """Stands in a payload for a function: its pickle. To plain pickle it is as good as data."""

    __slots__ = ("_reduction",)

    def __init__(self, data: bytes) -> None:
        self._reduction = thawed, (data,)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return self._reduction


class _Changeable(Exception):
    """Something goes with the function that may be changed in place, or that nobody here knows."""


# -- in a worker ---------------------------------------------------------------------------------------------------

_MOST_RECIPES = 64


class _Recipe:
    """How to make a function anew, as if it had just been unpickled, in 1 µs in place of 5.

    Its code is the same each time, so what the interpreter has learned of it stays.

    Raises:
        _Changeable: a task could change something that it would leave to the next one.
    """

    def __init__(self, function: Any) -> None:
        if type(function) is not FunctionType:
            raise _Changeable
        self._code = function.__code__
        self._names = dict(function.__globals__)
        self._name = function.__name__
        self._defaults = function.__defaults__
        self._contents = None if function.__closure__ is None else tuple(map(_CONTENTS, function.__closure__))
        self._attributes = dict(function.__dict__)
        self._annotations = dict(function.__annotations__)
        self._keyword_defaults = dict(function.__kwdefaults__) if function.__kwdefaults__ else None
        self._said = function.__qualname__, function.__module__, function.__doc__
        for values in (
            (value for name, value in self._names.items() if name != "__builtins__"),
            self._defaults or (),
            self._contents or (),
            self._attributes.values(),
            self._annotations.values(),
            (self._keyword_defaults or {}).values(),
        ):
            if not all(map(_is_nobodys, values)):
                raise _Changeable

    def make(self) -> FunctionType:
        closure = None if self._contents is None else tuple(map(CellType, self._contents))
        function = FunctionType(self._code, dict(self._names), self._name, self._defaults, closure)
        function.__qualname__, function.__module__, function.__doc__ = self._said
        if self._attributes:
            function.__dict__.update(self._attributes)
        if self._annotations:
            function.__annotations__ = dict(self._annotations)
        if self._keyword_defaults is not None:
            function.__kwdefaults__ = dict(self._keyword_defaults)
        return function


def _is_nobodys(value: Any) -> bool:
    """True if tasks may share it: it is not made anew for each of them, or they could not tell."""
    kind = type(value)
    if kind is tuple or kind is frozenset:
        return all(map(_is_nobodys, value))
    return (
        kind in _CONSTANT or _is_named(value) or (_is_alias(value) and all(map(_is_nobodys, _parts(value))))
    )


_recipes: dict[bytes, _Recipe | None] = {}


def thawed(data: bytes) -> Any:
    """The function; each time another one, with globals of its own, or those of an initializer."""
    if are_shared():
        return pickle.loads(data)
    recipe = _recipes.get(data)
    if recipe is not None:
        return recipe.make()
    function = pickle.loads(data)
    if data not in _recipes:
        if len(_recipes) >= _MOST_RECIPES:
            _recipes.clear()
        try:
            _recipes[data] = _Recipe(function)
        except (_Changeable, ValueError):
            _recipes[data] = None
    return function


# -- in the client -------------------------------------------------------------------------------------------------


class _Company:
    """What goes with a function, as it was when this was made.

    Attributes:
        modules: how many were loaded; cloudpickle looks for submodules that a function may mean.

    Raises:
        _Changeable: it cannot be told whether it stays the same.
    """

    def __init__(self, function: FunctionType) -> None:
        self._functions: list[tuple[FunctionType, tuple[Any, ...]]] = []
        self._names: list[tuple[Callable[..., Any], tuple[str, ...], tuple[Any, ...]]] = []
        self._cells: list[tuple[tuple[CellType, ...], tuple[Any, ...]]] = []
        self._items: list[tuple[Mapping[str, Any], list[str], list[Any]]] = []
        self.modules = len(sys.modules)
        self._met = {id(function)}
        waiting: list[Any] = []
        self._own = self._meet_function(function, waiting)  # without the function, which may go
        while waiting:
            self._meet(waiting.pop(), waiting)

    def is_the_same(self, function: FunctionType) -> bool:
        """True if nothing has changed, of the function and what goes with it."""
        try:
            if not all(map(is_, _ATTRIBUTES(function), self._own)):
                return False
            for get, names, was in self._names:
                if not all(map(is_, map(get, names, repeat(_NOTHING)), was)):
                    return False
            for items, keys, values in self._items:
                if (keys or items) and not ([*items] == keys and all(map(is_, items.values(), values))):
                    return False
            for other, was in self._functions:
                if not all(map(is_, _ATTRIBUTES(other), was)):
                    return False
            return all(all(map(is_, map(_CONTENTS, cells), was)) for cells, was in self._cells)
        except (ValueError, RuntimeError):
            return False  # a cell that has been emptied; a dictionary that another thread changes right now

    def _meet(self, value: Any, waiting: list[Any]) -> None:
        kind = type(value)
        if kind in _CONSTANT or id(value) in self._met:
            return
        self._met.add(id(value))
        if kind is tuple or kind is frozenset:
            waiting.extend(value)
        elif _is_named(value):
            pass
        elif kind is FunctionType:
            self._functions.append((value, self._meet_function(value, waiting)))
        elif _is_alias(value):
            waiting.extend(_parts(value))
        else:
            raise _Changeable

    def _meet_function(self, function: FunctionType, waiting: list[Any]) -> tuple[Any, ...]:
        get = function.__globals__.get
        names = (*_ITS_MODULE, *names_in(function.__code__))
        values = tuple(map(get, names, repeat(_NOTHING)))
        self._names.append((get, names, values))
        waiting.extend(value for value in values[len(_ITS_MODULE) :] if value is not _NOTHING)
        if function.__closure__ is not None:
            try:
                contents = tuple(map(_CONTENTS, function.__closure__))
            except ValueError:
                raise _Changeable from None
            self._cells.append((function.__closure__, contents))
            waiting.extend(contents)
        for items in (function.__dict__, function.__annotations__, function.__kwdefaults__ or {}):
            self._items.append((items, [*items], [*items.values()]))
            waiting.extend(items.values())
        waiting.append(function.__defaults__)
        return _ATTRIBUTES(function)


def _is_named(value: Any) -> bool:
    """True for modules, functions and classes that are pickled by their name."""
    kind = type(value)
    if kind is ModuleType:
        return value.__name__ not in MAIN and sys.modules.get(value.__name__) is value
    return (isinstance(value, type) or kind is FunctionType or kind is BuiltinFunctionType) and _has_name(
        value
    )


def _has_name(value: Any) -> bool:
    """True if a function or class is pickled by its name."""
    if value is type(None):
        return True  # which pickle knows, though no module has it
    module = getattr(value, "__module__", None)
    found: Any = None if module in MAIN else sys.modules.get(module)  # type: ignore[arg-type]
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _is_alias(value: Any) -> bool:
    """True for what annotations are made of, beside classes."""
    kind = type(value)
    return kind is GenericAlias or kind is UnionType or kind.__module__ == "typing"


def _parts(value: Any) -> Iterable[Any]:
    """What an alias is made of."""
    origin, parts = getattr(value, "__origin__", None), getattr(value, "__args__", None)
    if type(value).__name__ == "_SpecialForm":  # `typing.Union`: pickled by its name
        return ()
    if type(parts) is not tuple:
        raise _Changeable
    return origin, *parts


class _Entry:
    """A function that has travelled by value.

    Attributes:
        frozen: None before it has travelled twice, and where it cannot be.
        uses: how often it was of use.
        failures: how often in a row it was not worth it.
    """

    __slots__ = ("company", "failures", "frozen", "function", "uses")

    def __init__(self, function: FunctionType) -> None:
        self.function = weakref.ref(function)
        self.frozen: Frozen | None = None
        self.company: _Company | None = None
        self.uses = 0
        self.failures = 0


_entries: dict[int, _Entry] = {}


def find(function: object) -> Frozen | None:
    """What to pickle in place of a function; None if that is the function itself.

    For the function of a task, where all else is plain: what is to share something with it is to be pickled with it.
    """
    entry = _entries.get(id(function))
    if entry is None:
        return None
    frozen, company = entry.frozen, entry.company
    if company is None or entry.function() is not function:
        return None
    is_complete = company.modules == len(sys.modules)
    if is_complete and company.is_the_same(function) and not _is_any_registered():  # type: ignore[arg-type]
        entry.uses += 1
        return frozen
    if is_complete:
        entry.failures = 0 if entry.uses >= _WORTH_IT else entry.failures + 1
    entry.frozen = entry.company = None
    entry.uses = 0
    return None


def note(function: object, pickled: Callable[[object], bytes]) -> None:
    """A task's function has travelled by value: the second time it is worth being frozen.

    Args:
        pickled: pickles it by value, so that nothing is in its bytes that gives away what has to travel so.
    """
    if type(function) is not FunctionType or _has_name(function):
        return
    entry = _entries.get(id(function))
    if entry is None or entry.function() is not function:
        if len(_entries) >= _MOST:
            _entries.clear()
        _entries[id(function)] = _Entry(function)
    elif entry.frozen is None and entry.failures < _MOST_FAILURES and not _is_any_registered():
        try:
            company = _Company(function)
            data = pickled(function)
            if len(data) > _LARGEST or not company.is_the_same(function):
                raise _Changeable
        except Exception:
            entry.failures = _MOST_FAILURES
        else:
            entry.frozen, entry.company = Frozen(data), company


def _is_any_registered() -> bool:
    """True if the program has modules of its choice pickled by value."""
    return not registered_by_value() <= _MAIN
