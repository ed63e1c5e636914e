"""What tasks leave behind in their worker: descriptors, threads, children. Noticed and named, not taken away.

It may be a cache that the next task is to find: a connection, a helper process. So nothing of it is touched as long
as the worker lives; the client is told, and all of it goes with the worker. Runs in: a worker.
"""

import os
import sys
from typing import NamedTuple

from . import _platform

_TOLD = 10  # of each kind: texts that are sent
_LONGEST = 300  # characters of such a text


class Leftovers(NamedTuple):
    """What one look has found that the one before had not.

    Attributes:
        task: the name of the task, or of the last one if there were several.
        tasks: how many there were since the look before.
        descriptors, threads, children: each in words, which may be "" for those after the first few.
        reason: why the worker leaves, if it does for that.
    """

    task: str
    tasks: int
    descriptors: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    reason: str = ""

    def describe(self) -> str:
        """In words, for a person."""
        parts = [
            f"{len(found)} {name if len(found) > 1 else single} ({', '.join(found[:5])}{', ...' if found[5:] else ''})"
            for name, single, found in (
                ("descriptors", "descriptor", self.descriptors),
                ("threads", "thread", self.threads),
                ("children", "child", self.children),
            )
            if found
        ]
        whose = self.task if self.tasks == 1 else f"one of {self.tasks} tasks, the last of them {self.task},"
        left = f"left {' and '.join(parts)} in its worker" if parts else ""
        replaced = f"the worker is replaced: {self.reason}" if self.reason else ""
        return f"{whose} {left}{'; ' if left and replaced else ''}{replaced}"


def encode(leftovers: Leftovers) -> bytes:
    """As the body of a message: of what is more than can be told only the number, so that it fits into one."""
    import json  # 2 ms, and most workers never need it

    task, tasks, *found, reason = leftovers
    short = [(len(each), [text[:_LONGEST] for text in each[:_TOLD]]) for each in found]
    return json.dumps((task[:_LONGEST], tasks, *short, reason[:_LONGEST])).encode()


def decode(body: bytes) -> Leftovers:
    """What `encode` made.

    Raises:
        ValueError, TypeError: it is something else.
    """
    import json

    fields = json.loads(body)
    if not isinstance(fields, list) or len(fields) != len(Leftovers._fields):
        raise ValueError("no leftovers")
    task, tasks, descriptors, threads, children, reason = fields
    found = [
        (*map(str, texts), *[""] * (int(count) - len(texts)))
        for count, texts in (descriptors, threads, children)
    ]
    return Leftovers(str(task), int(tasks), found[0], found[1], found[2], str(reason))


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
            tuple(map(_target, new_descriptors)),
            tuple(sorted(threads[ident] for ident in new_threads)),
            tuple(f"{_command(pid)}, pid {pid}" for pid in new_children),
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
