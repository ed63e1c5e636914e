"""What a client process does with its pools at its own turning points: at its exit, and in a forked child.

And what `multiprocessing` expects of whoever starts processes: its key, and word of what may pass to them.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, process
from typing import Protocol

from .fds import Fd


class Owner(Protocol):
    """Something with processes and descriptors that must not outlive this process."""

    def shut_down(self) -> None:
        """Finish what was begun, and end; does not wait."""

    def end(self, grace_s: float, reason: str) -> None:
        """End now; does not wait."""

    def join(self) -> None:
        """Wait for the end."""

    def forget_in_child(self) -> None:
        """Runs in a forked child: close the copies, and leave the parent's things alone."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_exiting = False


def register(owner: Owner) -> None:
    """Have `owner` ended at interpreter exit at the latest."""
    _owners.add(owner)


def unregister(owner: Owner) -> None:
    """`owner` has ended."""
    _owners.discard(owner)


def owners() -> list[Owner]:
    """All that have not ended."""
    while True:
        try:
            return list(_owners)
        except RuntimeError:  # another thread has just made one, or dropped one
            continue


def exiting() -> bool:
    """True once the interpreter has begun to exit."""
    return _exiting


class _ToChildren:
    """Stands in for multiprocessing's Popen, which is asked for the descriptors of what it pickles."""

    @staticmethod
    def duplicate_for_child(fd: int) -> int:
        return fd

    @staticmethod
    def DupFd(fd: int) -> Fd:
        return Fd(fd)


@contextmanager
def for_children() -> Iterator[None]:
    """In this block, and thread, multiprocessing's locks and queues may be pickled: it goes to our children."""
    before = context.get_spawning_popen()
    context.set_spawning_popen(_ToChildren())  # type: ignore[arg-type]
    try:
        yield
    finally:
        context.set_spawning_popen(before)


def multiprocessing_key() -> bytes:
    """The key with which this process and its children know each other (managers ask for it)."""
    return bytes(process.current_process().authkey)


def _finish_all() -> None:
    """Runs in: the main thread at interpreter exit. Finish pending work, as concurrent.futures does.

    Unless it is Ctrl-C that ends the program: then nobody wants to wait, and the workers are killed. A
    Ctrl-C during the wait does the same.
    """
    global _exiting
    _exiting = True
    ending = owners()
    try:
        for owner in ending:
            if getattr(sys, "last_type", None) is KeyboardInterrupt:
                owner.end(0.0, "the program was interrupted")
            else:
                owner.shut_down()
        for owner in ending:
            owner.join()
    except KeyboardInterrupt:
        for owner in ending:
            owner.end(0.0, "the program was interrupted at its exit")
        for owner in ending:
            owner.join()
        raise


def _forget_all_in_child() -> None:
    for owner in list(_owners):
        owner.forget_in_child()
    _owners.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)
# Where concurrent.futures registers itself (Python 3.9): before the interpreter waits for its threads.
# `atexit` would come after that, when a thread that waits for one of our futures has been waited for in vain.
getattr(threading, "_register_atexit", atexit.register)(_finish_all)
