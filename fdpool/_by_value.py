"""What becomes of functions and classes that come by value.

cloudpickle gives the functions of each payload globals of their own: a copy of what they refer to, as that is in the
client when they are submitted. What an initializer of `__main__` sets would be where no task sees it. So if there is
such an initializer, all functions of `__main__` share its globals from then on. What comes with them is put
there, as the client's values of that moment, but for what is the worker's own:

    a name that the initializer has assigned, which the client may have, too (`connection = None`)
    an object that it refers to and may have changed (a list, a dictionary, an instance)

And a class that comes back to the process that has sent it is left as it is there.

Runs in: a worker; but for `reduced`, where something is pickled, and for classes, where they come back.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

# What nobody changes in place. (In a tuple there may be a list.)
_CONSTANT = (type(None), bool, int, float, complex, str, bytes, frozenset, type, ModuleType, FunctionType)

#: What the program itself is called.
MAIN = ("__main__", "__mp_main__")


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
    came: dict[str, Any] = {}
    referred: set[str] | None = None  # of what has come, where more has come than the initializer refers to
    if isinstance(inherited, FunctionType) and inherited.__globals__.get("__name__") in MAIN:
        _shared.names = inherited.__globals__
        came.update(_shared.names)
        referred = names_in(inherited.__code__)
    _shared.came = came
    try:
        yield
    finally:
        _shared.came = None
        _shared.own = frozenset(
            name
            for name, value in (_shared.names or {}).items()
            if not name.startswith("__")
            and (value is not came.get(name, came) or _may_have_changed(name, value, referred))
        )


def are_shared() -> bool:
    """True if functions of `__main__` have, or are about to have, the globals of an initializer."""
    return _shared.names is not None or _shared.came is not None


def _may_have_changed(name: str, value: object, referred: set[str] | None) -> bool:
    return not isinstance(value, _CONSTANT) and (referred is None or name in referred)


def names_in(code: CodeType) -> set[str]:
    """The names that a function's code refers to, and that of those inside it."""
    return {name for each in all_code(code) for name in each.co_names}


def all_code(code: CodeType) -> Iterator[CodeType]:
    """Of a function, and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from all_code(constant)


def reduced(obj: object, reduction: Any) -> Any:
    """What cloudpickle makes of a function, changed so that the worker's `__main__` is what it is made in; and of a
    class, so that it is left alone where it is at home."""
    if not isinstance(reduction, tuple) or len(reduction) != 6:
        return reduction  # by reference
    make, arguments, state, *rest, finish = reduction
    from cloudpickle import cloudpickle  # 32 ms, and loaded where it is of use

    if isinstance(obj, FunctionType):
        is_usual = make is cloudpickle._make_function and finish is cloudpickle._function_setstate
        if is_usual and obj.__globals__.get("__name__") in MAIN:
            return _made, arguments, state, *rest, _finished
    elif isinstance(obj, type) and finish is cloudpickle._class_setstate:
        if obj not in _foreign:
            _at_home.add(obj)
        return make, arguments, state, *rest, _class_finished
    return reduction  # in a way that this release of cloudpickle does not have


#: Classes that have travelled by value: those that this process has sent first, and those that it has received.
_at_home: weakref.WeakSet[type] = weakref.WeakSet()
_foreign: weakref.WeakSet[type] = weakref.WeakSet()
# A forked worker's are its client's, which may have changed them since.
os.register_at_fork(after_in_child=_at_home.clear)


def is_at_home(cls: type) -> bool:
    """True for a class that this process has sent, and nobody has sent to it."""
    return cls in _at_home


def _class_finished(cls: type, state: Any) -> None:
    """Give a class its attributes, if it is not this process's own that comes back.

    cloudpickle knows that one by an id, and would put the worker's functions into it, with the globals that those had.
    """
    if cls not in _at_home:
        from cloudpickle import cloudpickle

        _foreign.add(cls)
        cloudpickle._class_setstate(cls, state)


def registered_by_value() -> set[str]:
    """Modules that cloudpickle pickles by value; those of the program itself may be among them."""
    cloudpickle = sys.modules.get("cloudpickle")
    found: set[str] = getattr(cloudpickle, "list_registry_pickle_by_value", set)()
    return found


def _made(code: object, names: dict[str, Any], *rest: object) -> Any:
    if _shared.names is not None:
        names = _shared.names
    elif _shared.came is not None:
        _shared.names = names
    from cloudpickle import cloudpickle

    return cloudpickle._make_function(code, names, *rest)


def _finished(function: Any, state: Any) -> None:
    attributes, slots = state
    if function.__globals__ is _shared.names:
        came = slots["__globals__"]
        if _shared.came is not None:
            _shared.came.update(came)
        slots["__globals__"] = {name: value for name, value in came.items() if name not in _shared.own}
    from cloudpickle import cloudpickle

    cloudpickle._function_setstate(function, (attributes, slots))
