"""A worker and all that descends from it, on its way out: its stacks if they are wanted, then SIGTERM, then SIGKILL.

Runs in: the supervisor, which calls `step` when `due` says so. Where it cannot look at processes, as no descriptor is
left, it signals the worker's process group, which takes none; the rest is found when the worker is dead.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from . import _forensics, _trees

if TYPE_CHECKING:
    import psutil

_STACKS_S = 1.0  # how long the stacks may take on a busy machine; one that is stopped never writes them
_LOOK_S = 0.002
_QUIET_LOOKS = 5  # so many in which nothing was added: they are complete


class Ending:
    """The end of one worker, which is an unreaped child as long as it is not `dead`.

    Args:
        pid: of the worker.
        stacks_fd: where its stacks go, if they are wanted before; else None. Borrowed.
        grace_s: seconds from SIGTERM to SIGKILL; with 0, SIGKILL at once.
        now: CLOCK.monotonic().

    Attributes:
        due: when `step` is to be called; None once everything has been sent SIGKILL.
        kills_at: when that is, if the stacks take no time.
        dead: set by the owner when the worker has been reaped.

    Of a worker that somebody else has reaped there is nothing to end.
    """

    def __init__(self, pid: int, stacks_fd: int | None, grace_s: float, now: float) -> None:
        self.dead = False
        self.due: float | None = now
        self.kills_at = now + grace_s
        self._pid = pid
        self._grace_s = grace_s
        self._processes: list[psutil.Process] = []
        try:
            self._look()
        except _trees.CANNOT_LOOK:
            pass  # it is looked again before anything is signalled
        self._told = False
        self._stacks_fd = stacks_fd
        self._stacks_until = now + _STACKS_S
        self._bytes = self._quiet = 0
        if stacks_fd is not None and not _forensics.ask(pid):
            self._stacks_fd = None

    def hasten(self, grace_s: float, now: float) -> None:
        """SIGKILL comes `grace_s` seconds from now at the latest. Who was sent SIGTERM is not sent another: programs
        take a second one for more than the first."""
        if self.due is None or now + grace_s >= self.kills_at:
            return
        self.kills_at = now + grace_s
        self._grace_s = grace_s
        if self._told or not grace_s:
            self._stacks_fd = None
            self.due = self.kills_at

    def add(self, processes: list[psutil.Process]) -> None:
        """These are to end with it."""
        known = set(self._processes)
        self._processes += [each for each in processes if each not in known]

    def step(self, now: float) -> None:
        """Do what is due."""
        if self._stacks_fd is not None:
            if not self.dead and now < self._stacks_until and not self._stacks_are_written(self._stacks_fd):
                self.due = now + _LOOK_S
                return
            self._stacks_fd = None
        if not self._told and self._grace_s > 0:
            self._told = True
            self._signal(*_trees.TERMINATE)
            self.due = now + self._grace_s
            return
        self._signal(signal.SIGKILL)
        self.due = None

    def _signal(self, *numbers: int) -> None:
        try:
            self._look()  # also for what they have forked since
            for number in numbers:
                _trees.signal_all(self._processes, number)
        except _trees.CANNOT_LOOK:
            if not self.dead and _trees.is_ours(self._pid):
                for number in numbers:
                    _trees.signal_group(self._pid, number)

    def _look(self) -> None:
        if not self.dead:
            self.add(_trees.tree(self._pid))

    def _stacks_are_written(self, fd: int) -> bool:
        size = os.fstat(fd).st_size
        self._quiet = self._quiet + 1 if size == self._bytes and size else 0
        self._bytes = size
        return self._quiet >= _QUIET_LOOKS
