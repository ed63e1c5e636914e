"""What tasks leave behind in their worker: descriptors, threads, children. Noticed and named, not taken away.

It may be a cache that the next task is to find: a connection, a helper process. So nothing of it is touched as long
as the worker lives; the client is told, and all of it goes with the worker. Runs in: a worker.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from . import _platform

_Function = TypeVar("_Function", bound=Callable[..., object])

_TOLD = 10  # of each kind: texts that are sent
_LONGEST = 300  # characters of such a text
_MOST = 2**31  # there are fewer of anything in one process


class Found(NamedTuple):
    """What was found of one kind: how many, and the first few in words."""

    number: int = 0
    texts: tuple[str, ...] = ()


class Leftovers(NamedTuple):
    """What one look has found that the one before had not.

    Attributes:
        task: the name of the task, or of the last one if there were several.
        tasks: how many there were since the look before.
        descriptors, threads, children: what of each.
        reason: why the worker leaves, if it does for that.
    """

    task: str
    tasks: int
    descriptors: Found = Found()
    threads: Found = Found()
    children: Found = Found()
    reason: str = ""

    def describe(self) -> str:
        """In words, for a person."""
        parts = [
            f"{number} {name if number > 1 else single} ({', '.join(texts[:5])}{', ...' if number > 5 else ''})"
            for name, single, (number, texts) in (
                ("descriptors", "descriptor", self.descriptors),
                ("threads", "thread", self.threads),
                ("children", "child", self.children),
            )
            if number
        ]
        whose = self.task if self.tasks == 1 else f"one of {self.tasks} tasks, the last of them {self.task},"
        left = f"left {' and '.join(parts)} in its worker" if parts else ""
        replaced = f"the worker is replaced: {self.reason}" if self.reason else ""
        return f"{whose} {left}{'; ' if left and replaced else ''}{replaced}"


def encode(leftovers: Leftovers) -> bytes:
    """As the body of a message: of what is more than can be told only the number, so that it fits into one."""
    import json  # 2 ms, and most workers never need it

    task, tasks, *found, reason = leftovers
    short = [(number, [text[:_LONGEST] for text in texts[:_TOLD]]) for number, texts in found]
    return json.dumps((task[:_LONGEST], tasks, *short, reason[:_LONGEST])).encode()


def decode(body: bytes) -> Leftovers:
    """What `encode` made.

    Raises:
        ValueError: it is something else, which a child that a task has forked may have sent.
    """
    import json

    try:
        task, tasks, descriptors, threads, children, reason = json.loads(body)
        found = _decode(descriptors), _decode(threads), _decode(children)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no leftovers: {error}") from None
    if type(task) is not str or not _is_number(tasks) or type(reason) is not str:
        raise ValueError("no leftovers")
    return Leftovers(task, tasks, *found, reason)


def _decode(fields: Any) -> Found:
    number, texts = fields
    if not _is_number(number) or type(texts) is not list or len(texts) != min(number, _TOLD):
        raise ValueError("no leftovers of one kind")
    if any(type(text) is not str for text in texts):
        raise ValueError("leftovers in no words")
    return Found(number, tuple(texts))


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


#: Functions of ours that change nothing of their worker, and leave nothing in it but children, if anything. By their
#: ids, which no other function can have: these live as long as the process.
careful: set[int] = set()


def is_careful(function: _Function) -> _Function:
    """Decorator: count a function among the `careful`."""
    careful.add(id(function))
    return function


class Watch:
    """Remembers what was there, so that what is new can be named."""

    def __init__(self) -> None:
        self._descriptors = _descriptors()
        self._at_first = None if self._descriptors is None else len(self._descriptors)
        self._threads = _threads()
        self._children = _platform.child_pids(len(self._threads) > 1)  # asking psutil takes milliseconds

    @property
    def descriptors_more(self) -> int:
        """How many descriptors there are more than at first."""
        if self._descriptors is None or self._at_first is None:
            return 0
        return len(self._descriptors) - self._at_first

    def look(self, task: str, tasks: int) -> Leftovers | None:
        """What is new since the last look, or None. 35 microseconds where there is nothing; with children and several
        threads some 20 more for each of these."""
        descriptors, threads = _descriptors(), _threads()
        # Of a thread that was there at the last look and is ending the kernel may still have children.
        children = _platform.child_pids(len(threads) > 1 or len(self._threads) > 1)
        new_descriptors = _new(descriptors, self._descriptors)
        new_threads = threads.keys() - self._threads.keys()
        new_children = _new(children, self._children)
        self._threads = threads
        if descriptors is not None:
            self._descriptors = descriptors
        if children is not None:
            self._children = children
        if not (new_descriptors or new_threads or new_children):
            return None
        return Leftovers(
            task,
            tasks,
            Found(len(new_descriptors), tuple(map(_target, new_descriptors[:_TOLD]))),
            Found(len(new_threads), tuple(sorted(threads[ident] for ident in new_threads))),
            Found(len(new_children), tuple(f"{_command(pid)}, pid {pid}" for pid in new_children[:_TOLD])),
        )


def _new(now: set[int] | None, before: set[int] | None) -> list[int]:
    """What there was not before; nothing where nobody could look, now or before."""
    return [] if now is None or before is None else sorted(now - before)


def _descriptors() -> set[int] | None:
    """All that are open; None if none is left to look with."""
    try:
        found = {int(entry) for entry in os.listdir("/dev/fd")}
        # The one that read the folder is among them. It is free again, so it is what the next one gets; and a file that
        # a task opens may get it later.
        reader = os.dup(0)
    except OSError:
        return None
    os.close(reader)
    found.discard(reader)
    return found


def _target(fd: int) -> str:
    """What a descriptor is."""
    try:
        return f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}"
    except OSError:
        return str(fd)


def _threads() -> dict[int | None, str]:
    threading = sys.modules.get("threading")
    if threading is None:
        return {}
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return "a process"
