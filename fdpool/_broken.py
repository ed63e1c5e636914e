"""The two errors that are a `concurrent.futures` `BrokenProcessPool`: one task lost, or the pool."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

from .errors import FdpoolError


class WorkerLost(FdpoolError, BrokenProcessPool):
    """A task's worker died while it ran the task. Only this task is lost; the pool goes on.

    Attributes:
        pid: process id that the worker had.
        slot: number of the worker's slot.
        signal: the signal that ended it, or None.
        exit_code: its exit status, or None if a signal ended it or nobody knows.
        stacks: its Python stacks as it died of a fault (SIGSEGV and its like), as text; empty otherwise.
        stderr: the end of what its Python code wrote to stderr.
    """

    may_have_run = True

    def __init__(
        self,
        message: str,
        pid: int = 0,
        slot: int = 0,
        signal: int | None = None,
        exit_code: int | None = None,
        stacks: str = "",
        stderr: str = "",
    ) -> None:
        super().__init__(message)
        self.pid = pid
        self.slot = slot
        self.signal = signal
        self.exit_code = exit_code
        self.stacks = stacks
        self.stderr = stderr


class PoisonTask(WorkerLost):
    """A task that was tried again, as its `retries` allowed, and whose worker died each time. It is not tried any more.

    Attributes:
        attempts: what became of the attempts before, oldest first; the last is what this error else describes.
    """

    attempts: tuple[BaseException, ...] = ()


class PoolBroken(FdpoolError, BrokenProcessPool):
    """The whole pool is unusable: its initializer failed, its workers cannot start, or its
    supervisor is gone. The message says which, and carries the cause."""


def describe_status(status: int | None) -> str:
    """Say in words what a wait status means: `"was killed by SIGKILL"`, `"exited with code 3"`."""
    if status is None:
        return "ended with an unknown status (it was somebody else's child, or was reaped by somebody else)"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"was killed by {name}"
    return f"exited with code {os.WEXITSTATUS(status)}"
