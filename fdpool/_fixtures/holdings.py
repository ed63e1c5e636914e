"""What the pools of this process hold: their descriptors, processes and threads, so that no leak check blames a test
for what a pool of longer life does on its behalf."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .. import _process

_PREFIX = "fdpool."

#: Modules whose objects hold nothing but data, and a lot of that.
_PURE = {f"{_PREFIX}_dispatch", f"{_PREFIX}_slots"}

#: Attributes with a descriptor's number as it stands.
_NUMBERS = {"_read", "_write", "_inner_fd", "_outer_fd"}

#: Numbers of descriptors that live as long as the whole run, whichever test has asked for them first.
LASTING: set[int] = set()

#: Names that fdpool gives to its memory files; the mapping of one holds a duplicate that no attribute names.
MEMORY = "/memfd:fdpool"


class Holdings(NamedTuple):
    """What some pools hold."""

    descriptors: frozenset[int]
    processes: frozenset[int]  # supervisors; the workers are their children
    threads: frozenset[threading.Thread]


def live_pools() -> set[Any]:
    """The lifetimes of the pools, and the servers, that are not over yet; in no order."""
    return {owner for owner in _process.owners() if not getattr(owner, "is_over", False)}


def holdings_of(pools: Iterable[Any]) -> Holdings:
    """What `pools` hold just now. Found by walking over their attributes, so it may name a number too many
    (one that was closed and forgotten there), and is for telling what is *not* somebody else's."""
    numbers: set[int] = set()
    processes: set[int] = set()
    threads: set[threading.Thread] = set()
    for name, value in _attributes(pools):
        if isinstance(value, threading.Thread):
            threads.add(value)
        elif isinstance(value, int):
            if name == "pid":
                processes.add(value)
            elif name in _NUMBERS or name.endswith("fd"):
                numbers.add(value)
        elif (number := _number_of(value)) is not None:
            numbers.add(number)
    return Holdings(frozenset(numbers), frozenset(processes), frozenset(threads))


def _attributes(roots: Iterable[object]) -> Iterator[tuple[str, Any]]:
    """Each attribute, and each member of a container, that can be reached through objects of this package."""
    seen: set[int] = set()
    todo: list[object] = list(roots)
    while todo:
        holder = todo.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, value in _members(holder):
            yield name, value
            if isinstance(value, (list, tuple, set, frozenset, dict)) or _is_ours(value):
                todo.append(value)


def _members(holder: object) -> list[tuple[str, Any]]:
    try:
        if isinstance(holder, dict):
            return [("", value) for value in list(holder.values())]
        if isinstance(holder, (list, tuple, set, frozenset)):
            return [("", value) for value in list(holder)]
    except RuntimeError:  # it changed meanwhile; what is new in it is too new to matter
        return []
    found = list(getattr(holder, "__dict__", {}).items())
    for kind in type(holder).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        found += [
            (name, getattr(holder, name)) for name in names if name != "__weakref__" and hasattr(holder, name)
        ]
    return found


def _is_ours(value: object) -> bool:
    module = type(value).__module__
    return module.startswith(_PREFIX) and module not in _PURE and not isinstance(value, type)


def _number_of(value: object) -> int | None:
    """The descriptor of what has one; None for everything else, and for what is closed."""
    fileno = getattr(type(value), "fileno", None)
    if fileno is None:
        return None
    try:
        number = fileno(value)
    except (OSError, ValueError):
        return None
    return number if isinstance(number, int) and number >= 0 else None
