"""Everything that descends from the programs of one task, so that it can be ended as a whole.

While a task's programs run, their worker is a subreaper (prctl(2)): a descendant whose parent dies becomes
the worker's child, whatever group or session it has moved to, and whatever became of its environment. So
what is a descendant of the worker and was none before the programs started, is theirs.

Invariant: a program is not reaped before its tree is dealt with. Until then nothing else can have its pid,
nor the number of the process group that it leads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import _platform, _trees

if TYPE_CHECKING:
    import psutil

# Orphans that this worker adopted while a program ran, and that outlived it: ours to reap when they die.
_adopted: set[int] = set()


class Progeny:
    """The programs of one task, and what descends from them. Make it before the first of them starts."""

    def __init__(self) -> None:
        self.leaders: list[int] = []
        self._unreaped: set[int] = set()
        self._groups: set[int] = set()
        self._before = _platform.child_pids()
        _platform.become_subreaper()
        _reap_adopted()

    def add(self, pid: int, leads_group: bool) -> None:
        """A program has been started; it is not reaped by anybody but `reap`."""
        self.leaders.append(pid)
        self._unreaped.add(pid)
        if leads_group:
            self._groups.add(pid)

    def signal(self, number: int) -> None:
        """Send a signal to every process that is left, and to each once."""
        for pid in self._groups & self._unreaped:
            try:
                os.killpg(pid, number)
            except (ProcessLookupError, PermissionError):
                continue
        try:
            _trees.signal_all(self.others(outside=True), number)
        except _trees.CANNOT_LOOK:
            pass  # it comes again, but for a SIGTERM, and goes to what can be found then

    def signal_one(self, pid: int, number: int, group: bool) -> bool:
        """Send a signal to one program, or to its process group; False if that cannot be.

        It cannot once it has been reaped, nor if it has become another user's (a set-user-ID program).
        """
        if pid not in self._unreaped:
            return False
        try:
            os.killpg(pid, number) if group else os.kill(pid, number)
        except OSError:
            return False
        return True

    def others(self, outside: bool = False) -> list[psutil.Process]:
        """The living descendants beside the programs themselves; with `outside`, those in none of their groups.

        A program that is in no group of its own, or that left it, counts as outside too.
        """
        import psutil

        found = []
        for process in self._below():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if outside:
                    if os.getpgid(process.pid) not in self._groups & self._unreaped:
                        found.append(process)
                elif process.pid not in self._unreaped:
                    found.append(process)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found

    @property
    def has_others(self) -> bool:
        """True if descendants live beside the programs themselves, or nobody can look now."""
        try:
            return bool(self.others())
        except _trees.CANNOT_LOOK:
            return True

    def _below(self) -> list[psutil.Process]:
        """Every descendant, dead or alive."""
        if self._before is None:  # nobody can tell what was here before, but nothing is adopted either
            return [process for pid in self._unreaped for process in _trees.tree(pid)]
        found: dict[int, psutil.Process] = {}
        seen = set(self._before)
        # What loses its parent while we look below that one becomes a child of ours, so they are looked for again.
        while new := (self._unreaped | _trees.direct_children()) - seen:
            seen |= new
            for pid in new:
                found.update((process.pid, process) for process in _trees.tree(pid))
        return list(found.values())

    def reap(self, pid: int, wait: bool = True) -> tuple[int, object] | None:
        """The wait status and resource usage of a program; None if it lives, or somebody else has reaped it."""
        try:
            reaped, status, usage = os.wait4(pid, 0 if wait else os.WNOHANG)
        except ChildProcessError:
            reaped = 0
            status, usage = 0, None
            self._unreaped.discard(pid)
        if not reaped:
            return None
        self._unreaped.discard(pid)
        return status, usage

    def close(self) -> None:
        """Adopt no more. What the programs left running is reaped when it has died, some time."""
        _platform.become_subreaper(False)
        if self._before is not None:
            now = _platform.child_pids() or set()
            # A program that could not be killed stays a child of ours as well.
            _adopted.update(now - self._before)
        _reap_adopted()


def _reap_adopted() -> None:
    for pid in list(_adopted):
        try:
            reaped, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            reaped = pid
        if reaped:
            _adopted.discard(pid)


def ended(pid: int) -> bool:
    """True if a child of ours is dead; it stays unreaped."""
    if not hasattr(os, "waitid"):
        import psutil

        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
