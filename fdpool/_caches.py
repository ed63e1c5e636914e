"""Caches of the standard library that belong to what travels by value: each arrives as one of its kind, and empty.

cloudpickle leaves them to pickle: that names the function of an `lru_cache`, and refuses, before Python 3.12, the lock
of a `cached_property`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_LruCache = type(functools.lru_cache(len))


def reduced(obj: object) -> tuple[Any, ...] | None:
    """What to make `obj` of, or None if it is no cache of that kind."""
    if type(obj) is _LruCache:
        wrapper: Any = obj
        if wrapper.__module__ in ("__main__", "__mp_main__") or "<locals>" in wrapper.__qualname__:
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
