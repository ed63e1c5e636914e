"""Functions and classes that travel by value, pickled once for as long as nothing has changed that goes with them.

One of `__main__`, a lambda or a closure takes cloudpickle 15 to 60 µs for each task, a class 150, where what has a name
in a module takes 2: a flood of tasks took four times as long, one of instances ten times. But its pickle depends on
more than the object: on the values of the globals that a function names, of its cells, its defaults, of a class's
attributes. So all that is looked at for each task, by identity (2 to 10 µs), and only what can be looked at so may be
among it. Others are pickled anew each time.

What is pickled for itself shares no globals with what is beside it in a payload. Nobody can tell, if no function there
can assign to its globals; else only the function of a task is frozen, and only where all beside it is plain.

Runs in: whoever sends; but `thawed` and what it is made of, where things arrive.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import repeat
from operator import attrgetter, is_
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
    UnionType,
)
from typing import Any

from ._by_value import MAIN, all_code, are_shared, is_at_home, names_in, registered_by_value

_MOST = 256  # objects; each holds what goes with it
_MOST_ITEMS = 64  # of a list or a dictionary, which is looked at item by item
_LARGEST = 32 * 1024
_WORTH_IT = 4  # tasks; to freeze one takes as long as two of them are spared
_MOST_FAILURES = 3

_MAIN = frozenset(MAIN)
_CONSTANT = frozenset([type(None), bool, int, float, complex, str, bytes, range, EllipsisType])
_CONTENTS = attrgetter("cell_contents")
_NOTHING = object()

#: What cloudpickle takes of a function, and of its globals beside those that it names.
_OF_FUNCTION = attrgetter(
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
_ITS_MODULE = ("__package__", "__name__", "__path__", "__file__")
_REACHES = frozenset(["globals", "vars", "exec", "eval"])

#: And of a class; what its attributes may be that has no contents; and those that are its own, whoever makes it.
_OF_CLASS = attrgetter("__bases__", "__name__", "__qualname__")
_DESCRIPTORS = frozenset([GetSetDescriptorType, MemberDescriptorType])
_MADE_BY_TYPE = ("__dict__", "__weakref__")


class Frozen:
    """Stands in a payload for a function or class: its pickle. To plain pickle it is as good as data.

    Attributes:
        reduction: as of `__reduce__`.
    """

    __slots__ = ("reduction",)

    def __init__(self, data: bytes) -> None:
        import zlib  # 0.2 ms, and of use only here

        # Half the size or less; and what has arrived before is known by these bytes, and not unpacked again.
        self.reduction = thawed, (zlib.compress(data, 9),)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return self.reduction


class _Changeable(Exception):
    """Something goes with the object that nobody here can look at."""


# -- where things arrive -------------------------------------------------------------------------------------------

_MOST_RECIPES = 64


class _Shape:
    """What a function is, but for its globals.

    Raises:
        _Changeable: a task could change something that it would leave to the next one.
    """

    def __init__(self, function: FunctionType) -> None:
        self._code = function.__code__
        self._name = function.__name__
        self._defaults = function.__defaults__
        self._contents = None if function.__closure__ is None else tuple(map(_CONTENTS, function.__closure__))
        self._attributes = dict(function.__dict__)
        self._annotations = dict(function.__annotations__)
        self._keyword_defaults = dict(function.__kwdefaults__) if function.__kwdefaults__ else None
        self._said = function.__qualname__, function.__module__, function.__doc__
        for values in (
            self._defaults or (),
            self._contents or (),
            self._attributes.values(),
            self._annotations.values(),
            (self._keyword_defaults or {}).values(),
        ):
            if not all(map(_is_nobodys, values)):
                raise _Changeable

    def make(self, names: dict[str, Any]) -> FunctionType:
        closure = None if self._contents is None else tuple(map(CellType, self._contents))
        function = FunctionType(self._code, names, self._name, self._defaults, closure)
        function.__qualname__, function.__module__, function.__doc__ = self._said
        if self._attributes:
            function.__dict__.update(self._attributes)
        if self._annotations:
            function.__annotations__ = dict(self._annotations)
        if self._keyword_defaults is not None:
            function.__kwdefaults__ = dict(self._keyword_defaults)
        return function


class _Recipe:
    """How to make a function anew, as if it had just been unpickled, in 1 µs in place of 5, with what it names.

    Their code is the same each time, so what the interpreter has learned of it stays.

    Raises: as `_Shape`.
    """

    def __init__(self, function: Any) -> None:
        if type(function) is not FunctionType:
            raise _Changeable
        self._shape = _Shape(function)
        self._names: dict[str, Any] = {}
        self._own_names: list[str] = []
        self._others: list[tuple[str, _Shape]] = []
        self._classes: list[_Arrived] = []
        for name, value in function.__globals__.items():
            if value is function:
                self._own_names.append(name)
            elif name == "__builtins__" or _is_nobodys(value):
                self._names[name] = value
            elif type(value) is FunctionType and value.__globals__ is function.__globals__:
                self._others.append((name, _Shape(value)))
            elif isinstance(value, type) and not may_assign(function):
                self._classes.append(_Arrived(value))
                self._names[name] = value
            else:
                raise _Changeable

    def make(self) -> FunctionType | None:
        """The function; None if it is to be loaded once more, as a class that it names is not what it was."""
        for arrived in self._classes:
            if arrived.make() is None:
                return None
        names = dict(self._names)
        function = self._shape.make(names)
        for name in self._own_names:
            names[name] = function
        for name, shape in self._others:
            names[name] = shape.make(names)
        return function


def _is_nobodys(value: Any) -> bool:
    """True if tasks may share it: it is not made anew for each of them, or they could not tell."""
    kind = type(value)
    if kind is tuple or kind is frozenset:
        return all(map(_is_nobodys, value))
    return (
        kind in _CONSTANT or _is_named(value) or (_is_alias(value) and all(map(_is_nobodys, _parts(value))))
    )


class _Arrived:
    """A class that has come by value. A process has one of each, whoever sends it how often.

    Raises:
        _Changeable: nobody can tell whether it is still as it came.
    """

    def __init__(self, cls: type) -> None:
        self._class = weakref.ref(cls)
        self._company = None if is_at_home(cls) else _Company(cls)

    def make(self) -> type | None:
        """The class; None if it is to be loaded once more, as it is not what it was."""
        cls = self._class()
        if cls is None or self._company is None or self._company.is_the_same(cls):
            return cls
        return None


_recipes: dict[bytes, _Recipe | _Arrived | None] = {}


def thawed(data: bytes) -> Any:
    """The function, each time another one, with globals of its own, or those of an initializer; or the class."""
    if are_shared():
        return _unpacked(data)
    recipe = _recipes.get(data)
    made = None if recipe is None else recipe.make()
    if made is None:
        made = _unpacked(data)
        if recipe is not None or data not in _recipes:
            _learn(data, made)
    return made


def _unpacked(data: bytes) -> Any:
    import zlib

    return pickle.loads(zlib.decompress(data))


def _learn(data: bytes, made: Any) -> None:
    if len(_recipes) >= _MOST_RECIPES:
        _recipes.clear()
    try:
        _recipes[data] = _Arrived(made) if isinstance(made, type) else _Recipe(made)
    except Exception:  # whatever the objects of others raise as they are looked at
        _recipes[data] = None


# -- where things are sent from ------------------------------------------------------------------------------------


class _Company:
    """What goes with a function or class, as it was when this was made.

    Attributes:
        modules: how many were loaded; cloudpickle looks for submodules that a function may mean.
        is_pure: no function among it can assign to its globals.

    Raises:
        _Changeable: it cannot be told whether it stays the same.
    """

    def __init__(self, obj: FunctionType | type) -> None:
        self.modules = len(sys.modules)
        self.is_pure = True
        self._objects: list[tuple[Any, Callable[[Any], tuple[Any, ...]], tuple[Any, ...]]] = []
        self._names: list[tuple[Callable[..., Any], tuple[str, ...], tuple[Any, ...]]] = []
        self._cells: list[tuple[tuple[CellType, ...], tuple[Any, ...]]] = []
        self._items: list[tuple[Mapping[Any, Any], list[Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], frozenset[Any]]] = []
        self._met = {id(obj)}
        self._waiting: list[Any] = []
        # Without the object itself, which may go.
        if isinstance(obj, type):
            self._get_own, self._own = _OF_CLASS, self._of_class(obj)
        else:
            self._get_own, self._own = _OF_FUNCTION, self._of_function(obj)
        while self._waiting:
            self._meet(self._waiting.pop())

    def is_the_same(self, obj: Any) -> bool:
        """True if nothing has changed, of the object and what goes with it."""
        try:
            if not all(map(is_, self._get_own(obj), self._own)):
                return False
            for get, names, was in self._names:
                if not all(map(is_, map(get, names, repeat(_NOTHING)), was)):
                    return False
            for items, keys, values in self._items:
                if (keys or items) and not ([*items] == keys and all(map(is_, items.values(), values))):
                    return False
            for other, get_attributes, was in self._objects:
                if not all(map(is_, get_attributes(other), was)):
                    return False
            for members, were in self._lists:
                if len(members) != len(were) or not all(map(is_, members, were)):
                    return False
            if not all(now == was for now, was in self._sets):
                return False
            return all(all(map(is_, map(_CONTENTS, cells), was)) for cells, was in self._cells)
        except Exception:
            return False  # a cell that has been emptied; a dictionary that another thread changes right now

    def _meet(self, value: Any) -> None:
        kind = type(value)
        if kind in _CONSTANT or kind in _DESCRIPTORS or id(value) in self._met or _is_named(value):
            return
        self._met.add(id(value))
        if kind is FunctionType:
            self._objects.append((value, _OF_FUNCTION, self._of_function(value)))
        elif kind is type:
            self._objects.append((value, _OF_CLASS, self._of_class(value)))
        else:
            self._waiting += self._contents_of(value, kind)

    def _contents_of(self, value: Any, kind: type) -> Iterable[Any]:
        if kind is tuple or kind is frozenset:
            return value  # type: ignore[no-any-return]
        if kind is staticmethod or kind is classmethod:
            return (value.__func__,)
        if kind is property:
            return value.fget, value.fset, value.fdel
        if _is_alias(value):
            return _parts(value)
        if kind.__module__ == "dataclasses":  # a field, or what marks one
            return tuple(getattr(value, name, None) for name in ("type", "default", "default_factory"))
        if kind not in (dict, list, set) or len(value) > _MOST_ITEMS:
            raise _Changeable
        members = [*value]
        if kind is dict:
            values = [*value.values()]
            self._items.append((value, members, values))
            return members + values
        if kind is list:
            self._lists.append((value, members))
        else:
            self._sets.append((value, frozenset(members)))
        return members

    def _of_function(self, function: FunctionType) -> tuple[Any, ...]:
        code = function.__code__
        self.is_pure = self.is_pure and not may_assign(function)
        get = function.__globals__.get
        names = (*_ITS_MODULE, *names_in(code))
        values = tuple(map(get, names, repeat(_NOTHING)))
        self._names.append((get, names, values))
        self._waiting += (value for value in values[len(_ITS_MODULE) :] if value is not _NOTHING)
        if function.__closure__ is not None:
            try:
                contents = tuple(map(_CONTENTS, function.__closure__))
            except ValueError:
                raise _Changeable from None
            self._cells.append((function.__closure__, contents))
            self._waiting += contents
        for items in (function.__dict__, function.__annotations__, function.__kwdefaults__ or {}):
            self._items.append((items, [*items], [*items.values()]))
            self._waiting += items.values()
        self._waiting.append(function.__defaults__)
        return _OF_FUNCTION(function)

    def _of_class(self, cls: type) -> tuple[Any, ...]:
        if type(cls) is not type:
            raise _Changeable  # an Enum, an ABC: what those have beside, nobody here knows
        attributes = cls.__dict__
        self._items.append((attributes, [*attributes], [*attributes.values()]))
        self._waiting += (value for name, value in attributes.items() if name not in _MADE_BY_TYPE)
        self._waiting += cls.__bases__
        return _OF_CLASS(cls)


def may_assign(obj: object) -> bool:
    """True for a function that assigns to its globals, or may get at them otherwise."""
    return isinstance(obj, FunctionType) and any(map(_assigns, all_code(obj.__code__)))


def _assigns(code: CodeType) -> bool:
    return not (_assigning().isdisjoint(code.co_code[::2]) and _REACHES.isdisjoint(code.co_names))


@cache
def _assigning() -> frozenset[int]:
    from opcode import opmap  # 0.3 ms, and of use only here

    return frozenset(opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL"))


def _is_named(value: Any) -> bool:
    """True for modules, functions and classes that are pickled by their name."""
    kind = type(value)
    if kind is ModuleType:
        return value.__name__ not in MAIN and sys.modules.get(value.__name__) is value
    is_of_kind = isinstance(value, type) or kind is FunctionType or kind is BuiltinFunctionType
    return is_of_kind and _has_name(value)


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
    """A function or class that has travelled by value.

    Attributes:
        frozen: None before it has travelled twice, and where it cannot be.
        uses: how often it was of use.
        failures: how often in a row it was not worth it.
    """

    __slots__ = ("company", "failures", "frozen", "obj", "uses")

    def __init__(self, obj: FunctionType | type) -> None:
        self.obj = weakref.ref(obj)
        self.frozen: Frozen | None = None
        self.company: _Company | None = None
        self.uses = 0
        self.failures = 0


_entries: dict[int, _Entry] = {}


def find(obj: object, alone: bool = True) -> Frozen | None:
    """What to pickle in place of a function or class; None if that is the object itself.

    Args:
        alone: all that is beside it in the payload is plain.
    """
    entry = _entries.get(id(obj))
    if entry is None:
        return None
    frozen, company = entry.frozen, entry.company
    if company is None or entry.obj() is not obj or not (alone or company.is_pure):
        return None
    is_complete = company.modules == len(sys.modules)
    if is_complete and company.is_the_same(obj) and not _is_any_registered():
        entry.uses += 1
        return frozen
    if is_complete:
        entry.failures = 0 if entry.uses >= _WORTH_IT else entry.failures + 1
    entry.frozen = entry.company = None
    entry.uses = 0
    return None


def note(obj: Any, pickled: Callable[[object, bool], bytes]) -> None:
    """Something has travelled by value: the second time it is worth being frozen, if it is a function or class.

    Args:
        pickled: pickles it by value, so that nothing is in its bytes that gives away what has to travel so; and what
            goes with it for itself, if told so.
    """
    if not (type(obj) is FunctionType or isinstance(obj, type)) or _has_name(obj):
        return
    entry = _entries.get(id(obj))
    if entry is None or entry.obj() is not obj:
        if len(_entries) >= _MOST:
            _entries.clear()
        _entries[id(obj)] = _Entry(obj)
    elif entry.frozen is None and entry.failures < _MOST_FAILURES and not _is_any_registered():
        try:
            company = _Company(obj)
            data = pickled(obj, company.is_pure)
            if len(data) > _LARGEST or not company.is_the_same(obj):
                raise _Changeable
        except Exception:
            entry.failures = _MOST_FAILURES
        else:
            entry.frozen, entry.company = Frozen(data), company


def _is_any_registered() -> bool:
    """True if the program has modules of its choice pickled by value."""
    return not registered_by_value() <= _MAIN
