"""Why an object cannot be pickled: which part of it, and the way there, in words. Only run after a failure.

The parts are tried one by one, and the one that fails is taken apart in turn, so a deep object is pickled
once per level. That is slow and meant to be: it is the difference between "cannot pickle '_thread.lock'
object" and the name of the argument that holds it.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._naming import attribute_of, brief, name_of
from .errors import DescriptorRefused, FdpoolError, NotPicklable

_MAX_DEPTH = 12
_MAX_ATTEMPTS = 10_000

#: Pickles an object for the sake of the error alone: None if it can be pickled.
Attempt = Callable[[object], "Exception | None"]
Parts = Iterator[tuple[str, object]]


class Finding(NamedTuple):
    """The innermost part that fails, the steps to it from where the search began, and how it fails."""

    steps: str
    culprit: object
    error: Exception


def explain_call(
    error: Exception, fn: object, args: Sequence[object], kwargs: Mapping[str, object], attempt: Attempt
) -> FdpoolError:
    """The error to raise for a call that could not be pickled because of `error`."""
    explained = _explain(error, call_parts(fn, args, kwargs), "the task", attempt)
    explained.may_have_run = False
    return explained


def explain_value(error: Exception, value: object, name: str, attempt: Attempt) -> FdpoolError:
    """The error to raise for a single value, called `name`, that could not be pickled because of `error`."""
    return _explain(error, iter([(name, value)]), name, attempt)


def call_parts(fn: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Parts:
    """The function and each argument of a call, under the names that its author knows them by."""
    name = name_of(fn)
    call = f"{name}(...)"
    yield f"the function {name}", fn
    parameters = _parameter_names(fn)
    for position, value in enumerate(args):
        label = f" ({parameters[position]!r})" if position < len(parameters) else ""
        yield f"argument {position + 1}{label} of {call}", value
    for keyword, value in kwargs.items():
        yield f"argument {keyword!r} of {call}", value


def _parameter_names(fn: object) -> Sequence[str]:
    code = attribute_of(fn, "__code__")  # a bound method lends its function's
    if not isinstance(code, types.CodeType):
        return ()
    skip = 1 if isinstance(fn, types.MethodType) else 0
    return code.co_varnames[skip : code.co_argcount]


def _explain(error: Exception, parts: Parts, name: str, attempt: Attempt) -> FdpoolError:
    tries = _Counted(attempt)
    found = None
    for name_of_part, part in parts:
        found = tries.finding("", part, 0)
        if found is not None:
            name = name_of_part + (", at " if found.steps[:1] in ("[", ".") else "") + found.steps
            break
    if isinstance(error, DescriptorRefused):
        if found is None or not isinstance(found.error, DescriptorRefused):
            return DescriptorRefused(str(error))
        return DescriptorRefused(f"{name}: {found.error}")
    if (
        found is None
    ):  # each part can be pickled, so it was the whole: not twice the same answer, or no memory
        return NotPicklable(f"cannot pickle {name}: {_said(error)}")
    culprit = f"{brief(found.culprit)} ({type(found.culprit).__qualname__})"
    return NotPicklable(f"cannot pickle {name}: {culprit}: {_said(found.error)}")


def _said(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:
        text = "(no message)"
    return f"{type(error).__qualname__}: {text}"


class _Counted:
    """`attempt`, until it has been called too often: a list of a million parts is not searched to its end."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._left = _MAX_ATTEMPTS

    def finding(self, steps: str, part: object, depth: int) -> Finding | None:
        """The innermost failing part of `part`, or None if it can be pickled."""
        self._left -= 1
        error = self._attempt(part) if self._left >= 0 else None
        if error is None:
            return None
        if depth < _MAX_DEPTH:
            for step, inner in _parts(part):
                if inner is not part and (found := self.finding(steps + step, inner, depth + 1)):
                    return found
        return Finding(steps, part, error)


def _parts(obj: object) -> Parts:
    """What `obj` is made of, each with the step that leads there; nothing if it is one piece."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{brief(key)}]", value
            yield f", key {brief(key)}", key
    elif isinstance(obj, (list, tuple)):
        for position, value in enumerate(obj):
            yield f"[{position}]", value
    elif isinstance(obj, (set, frozenset)):
        for value in obj:
            yield ", an element", value
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        for position, value in enumerate(obj.args):
            yield f".args[{position}]", value
        for keyword, value in obj.keywords.items():
            yield f".keywords[{keyword!r}]", value
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        yield from _parts_of_function(obj)
    elif isinstance(obj, type):
        for name, value in vars(obj).items():
            if name not in ("__dict__", "__weakref__"):
                yield f".{name}", value
    else:
        yield from _parts_of_instance(obj)


def _parts_of_function(fn: types.FunctionType) -> Parts:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
        try:
            yield f", closure variable {name!r}", cell.cell_contents
        except ValueError:
            pass  # not assigned yet
    for position, value in enumerate(fn.__defaults__ or ()):
        yield f", default {position + 1}", value
    for keyword, value in (fn.__kwdefaults__ or {}).items():
        yield f", default of {keyword!r}", value
    for name in fn.__code__.co_names:
        if name in fn.__globals__:
            yield f", global {name!r}", fn.__globals__[name]
    for name, value in vars(fn).items():
        yield f".{name}", value


def _parts_of_instance(obj: object) -> Parts:
    """What its own `__reduce_ex__` says it is made of: an attribute that it leaves out is not to blame."""
    try:
        reduced: Any = obj.__reduce_ex__(5)
    except Exception:
        return  # it refuses as a whole
    if not isinstance(reduced, tuple):
        return
    func, args, state, items, pairs = (*reduced, None, None, None)[:5]
    states = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for attributes in states:
        if isinstance(attributes, dict):
            for name, value in attributes.items():
                yield f".{name}", value
        elif attributes is not None:
            yield ", its state", attributes
    made_by = getattr(func, "__name__", None)
    for position, value in enumerate(args or ()):
        yield (", its class" if value is type(obj) else f", argument {position + 1} of its {made_by}"), value
    yield ", what rebuilds it", func
    yield from ((f"[{position}]", value) for position, value in enumerate(items or ()))
    yield from ((f"[{brief(key)}]", value) for key, value in pairs or ())
