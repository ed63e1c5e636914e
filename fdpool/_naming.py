"""What objects are called in errors and statistics, whatever their classes do when they are asked."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any


def brief(obj: object) -> str:
    """`repr(obj)` for a message: at most 100 characters, and never an error of its own."""
    try:
        text = repr(obj)
    except Exception:
        text = object.__repr__(obj)
    return text if len(text) <= 100 else f"{text[:70]}...{text[-26:]}"


def attribute_of(obj: object, name: str) -> Any:
    """An attribute that `obj` may have, else None; a `__getattr__` may raise anything."""
    try:
        return getattr(obj, name, None)
    except Exception:
        return None


def name_of(fn: object) -> str:
    """What a callable is called in errors and statistics: its name, that of a partial's function, or its type's.

    Never a `repr`, which may be as long as what a partial holds, and fail.
    """
    if type(fn) is FunctionType and type(name := fn.__qualname__) is str:
        return name
    name = attribute_of(fn, "__qualname__")
    while type(name) is not str:
        if not isinstance(fn, functools.partial):
            return type(fn).__qualname__
        fn = fn.func
        name = attribute_of(fn, "__qualname__")
    return name
