"""Functions of `__main__` in a worker, where each comes by value: they share what its initializer has set.

cloudpickle gives the functions of each payload globals of their own: a copy of what they refer to, as that is in the
client when they are submitted. What an initializer of `__main__` sets would be where no task sees it. So if there is
such an initializer, all functions of `__main__` share its globals from then on. What comes with them is put
there, as the client's values of that moment, but for what is the worker's own:

    a name that the initializer has assigned, which the client may have, too (`connection = None`)
    an object that it refers to and may have changed (a list, a dictionary, an instance)

Runs in: a worker; but `reduced` and `cache`, where something is pickled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

# What nobody changes in place. (In a tuple there may be a list.)
_CONSTANT = (type(None), bool, int, float, complex, str, bytes, frozenset, type, ModuleType, FunctionType)

_MAIN = ("__main__", "__mp_main__")

_LruCache = type(functools.lru_cache(len))


class _Globals:
    """Those that functions of `__main__` share.

    Attributes:
        names: the globals; None before there are any.
        came: what came with functions, by name, until the initializer has run.
        own: names that are the worker's own.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] | None = None
        self.came: dict[str, Any] | None = None
        self.own: frozenset[str] = frozenset()


_shared = _Globals()


@contextmanager
def initializing(inherited: object = None) -> Iterator[None]:
    """Around the loading and running of an initializer: what it leaves in its globals stays.

    Args:
        inherited: the initializer itself, in a fork of the client; it may be one of the client's own `__main__`.
    """
    names = getattr(inherited, "__globals__", None)
    came: dict[str, Any] = {}
    if names is not None and names.get("__name__") in _MAIN:
        _shared.names = names
        came.update(names)
    _shared.came = came
    try:
        yield
    finally:
        _shared.came = None
        _shared.own = frozenset(
            name
            for name, value in (_shared.names or {}).items()
            if not name.startswith("__")
            and (value is not came.get(name, came) or not isinstance(value, _CONSTANT))
        )


def reduced(function: object, reduction: Any) -> Any:
    """What cloudpickle makes of a function, changed so that the worker's `__main__` is what it is made in."""
    if not (isinstance(function, FunctionType) and isinstance(reduction, tuple) and len(reduction) == 6):
        return reduction  # by reference, or in a way that this release of cloudpickle does not have
    if function.__globals__.get("__name__") not in _MAIN:
        return reduction
    make, arguments, state, items, pairs, set_state = reduction
    return _made, (make, *arguments), (set_state, state), items, pairs, _finished


def cache(obj: object) -> tuple[Any, ...] | None:
    """What a cache of the standard library becomes that belongs to something which travels by value: one of the same
    kind, and empty. None if `obj` is none.

    cloudpickle leaves them to pickle: that names the function, or, before Python 3.12, refuses the lock of a
    `cached_property`.
    """
    if type(obj) is _LruCache:
        wrapper: Any = obj
        if wrapper.__module__ in _MAIN or "<locals>" in wrapper.__qualname__:
            return _cached, (wrapper.__wrapped__, wrapper.cache_parameters())
    elif type(obj) is functools.cached_property:
        return _cached_property, (obj.func, obj.attrname)
    return None


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = functools.lru_cache(**parameters)(function)
    return made


def _cached_property(function: Callable[[Any], Any], name: str | None) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    made.attrname = name
    return made


def _made(make: Callable[..., Any], code: object, names: dict[str, Any], *rest: object) -> Any:
    if _shared.names is not None:
        names = _shared.names
    elif _shared.came is not None:
        _shared.names = names
    return make(code, names, *rest)


def _finished(function: Any, how: tuple[Callable[..., object], Any]) -> None:
    set_state, state = how
    attributes, slots = state
    if function.__globals__ is _shared.names:
        came = slots["__globals__"]
        if _shared.came is not None:
            _shared.came.update(came)
        slots["__globals__"] = {name: value for name, value in came.items() if name not in _shared.own}
    set_state(function, (attributes, slots))
