"""Which children of this process fdpool has started, so that those it merely adopts can be told from them.

Process 1 of a container, and a subreaper (prctl(2)), get the orphans of others as children. When these die, they stay
zombies until they are reaped, and whoever reaps all must not take a wait status that somebody waits for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from . import _trees

# Held from before a child is there until it is known. A signal handler may start one in the midst of that.
_lock = threading.RLock()
_own: set[int] = set()


def start(spawn: Callable[[], int]) -> int:
    """Start a child, whose pid `spawn` returns; it is ours, and is left alone by `reap_adopted`, until `forget`."""
    with _lock:
        pid = spawn()
        _own.add(pid)
        return pid


def forget(pid: int) -> None:
    """It has been reaped; its number may be a stranger's from now on."""
    _own.discard(pid)


def reap_adopted() -> None:
    """Reap each dead child that `start` has not started; never waits, and signals nobody.

    Only for a process in which nothing but fdpool starts children: any other's wait status would be lost to who waits
    for it. Not from a signal handler: it takes a lock.
    """
    with _lock:
        try:
            found = _trees.direct_children()
        except _trees.CANNOT_LOOK:
            return  # they are found with the next that dies
        for pid in found - _own:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass  # it has just been reaped by whoever has started it, and forgotten


def _forget_in_child() -> None:
    global _lock
    # The forked child of `start` is in the midst of it; of another thread's nobody would release the lock.
    _lock = threading.RLock()
    _own.clear()


os.register_at_fork(after_in_child=_forget_in_child)
