"""Finding and ending processes together with everything that descends from them.

A pid is only signalled while something keeps it from being used again: we are its parent and have not
reaped it, a pidfd of ours says that it lives, or psutil has compared its start time.

To look at processes takes descriptors, one at a time, and as many to load what looks. Without any left, whoever looks
gets one of `CANNOT_LOOK`: it is never said then that nothing lives.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Set
from typing import TYPE_CHECKING

from . import _platform, _signals
from ._clock import CLOCK

if TYPE_CHECKING:
    import psutil

#: Set in every worker to "<supervisor pid>.<token>.<slot>.<generation>" and inherited by the programs that its
#: tasks start; it tells whose they were once they have left the worker's process group and lost their parent.
#: The token, as a program may outlive its supervisor where nobody sees it, and the pid is used again.
WORKER_MARK = "FDPOOL_WORKER"

#: From SIGTERM to SIGKILL, where a program's end has not been given a time of its own.
GRACE_S = 1.0

TERMINATE = (signal.SIGTERM, signal.SIGCONT)  # a stopped process does not die of SIGTERM before it goes on

#: What is raised where nobody can look: EMFILE, ENFILE or ENOMEM, as psutil lets them through; or it cannot be loaded.
CANNOT_LOOK = (OSError, ImportError)

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_SWEEP_S = 5.0
_LOOK_AGAIN_S = 0.01  # where nobody could look


def descendants(pid: int) -> list[psutil.Process]:
    """Every living descendant of `pid`, nearest first; empty if `pid` is gone."""
    import psutil  # 34 ms, paid only where there is something to end

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def tree(pid: int) -> list[psutil.Process]:
    """`pid`, dead or alive, and its living descendants; empty if it has been reaped."""
    import psutil

    try:
        return [psutil.Process(pid), *descendants(pid)]
    except psutil.NoSuchProcess:
        return []


def signal_all(processes: list[psutil.Process], number: int) -> None:
    """Send a signal to each that still lives; those that are gone, or not ours to signal, are passed over.

    Raises:
        OSError: of some nobody can see now whether they are the same still. All others have been sent it.
    """
    if not processes:
        return  # 15 ms of each short pool's end went into importing psutil for nothing
    import psutil

    failure = None
    for process in processes:
        try:
            process.send_signal(number)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def kill_descendants(limit_s: float = _SWEEP_S, sparing: Set[int] = frozenset()) -> bool:
    """SIGKILL everything that descends from this process, again and again until nothing is left.

    A descendant may fork while we look, so one pass is not enough. Children of this process are reaped.
    Returns False if something survived `limit_s` seconds (an unkillable process), or nobody could look so long.

    Args:
        sparing: children of this process that are left alone, with all that descends from them.
    """
    deadline = CLOCK.monotonic() + limit_s
    while children_exist():
        try:
            if sparing and direct_children() <= sparing:
                break
            found = descendants(os.getpid())
            for pid in sparing:
                spared = {pid, *(process.pid for process in descendants(pid))}
                found = [process for process in found if process.pid not in spared]
            signal_all(found, signal.SIGKILL)
        except CANNOT_LOOK:
            time.sleep(_LOOK_AGAIN_S)
        else:
            for process in found:
                _reap_if_child(process.pid, deadline)
        if CLOCK.monotonic() > deadline:
            return False
    return True


def children_exist() -> bool:
    """True if this process has children; the dead among them are reaped on the way."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def next_dead_child() -> int | None:
    """The pid of a dead child of ours, not yet reaped, so that it still cannot be used again; or None.

    Where waitid(2) is missing (macOS), it is reaped here and `reap` remembers its status.
    """
    try:
        if hasattr(os, "waitid"):
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return None if found is None else found.si_pid
        pid, _reaped[pid] = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return pid or None


def is_ours(pid: int) -> bool:
    """False for a child of ours that somebody else has reaped, or the kernel; True also where nobody can tell."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def reap(pid: int) -> int | None:
    """The wait status of a dead child of ours, or None if somebody else has taken it."""
    if pid in _reaped:
        return _reaped.pop(pid)
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return None


_reaped: dict[int, int] = {}


def kill_group(pid: int) -> None:
    """SIGKILL the process group that `pid` leads; `pid` must be an unreaped child of ours, dead or alive."""
    signal_group(pid, signal.SIGKILL)


def signal_group(pid: int, number: int) -> None:
    """As `kill_group`, with another signal. It takes no descriptor."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # PermissionError: macOS, where all members are zombies
        pass


def strays(mark: str, known: set[int], area: tuple[int, int] | None = None) -> list[psutil.Process]:
    """The children of this process that come from a dead worker and are not `known`, with their descendants.

    For a subreaper: what a dead worker's tasks left behind becomes our child, whatever group or
    session it moved to.

    Args:
        mark: of the worker, which programs have in their environment.
        area: of the worker on the pool's board, as the file's inode and the offset in it: what was forked and never
            ran a program has it in its memory. As that is the slot's, only while no other worker has the slot.

    Raises:
        OSError, ImportError: as in `CANNOT_LOOK`.
    """
    strangers = [pid for pid in direct_children() if pid not in known]
    if not strangers:
        return []
    import psutil

    found = []
    for pid in strangers:
        try:
            process = psutil.Process(pid)
            if process.environ().get(WORKER_MARK) == mark or (area and _writes_to(pid, *area)):
                found += [process, *descendants(pid)]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        except OSError as error:
            _raise_if_no_room(error)
    return found


def supervisor_mark(pid: int, token: str) -> str:
    """What the marks of a supervisor's workers begin with, and no others."""
    return f"{pid}.{token}."


def kill_marked(supervisor: str, board_fd: int, limit_s: float = _SWEEP_S) -> bool:
    """SIGKILL all that comes from a worker of a supervisor that is dead, until nothing of it lives.

    A program has the worker's mark in its environment. What was forked and never ran a program has its worker's area of
    the pool's board in its memory (the client's own mapping is read-only). Looks at every process that this user
    may look at: 20 to 100 ms for some hundreds. Returns False if something survived `limit_s` seconds, or nobody could
    look so long.

    Args:
        supervisor: its `supervisor_mark`.
        board_fd: of that board; borrowed.
    """
    board = os.fstat(board_fd).st_ino
    deadline = CLOCK.monotonic() + limit_s
    while True:
        try:
            found = _marked(supervisor, board)
            if not found:
                return True
            signal_all(found, signal.SIGKILL)
            import psutil

            psutil.wait_procs(found, timeout=0.05)
        except CANNOT_LOOK:
            time.sleep(_LOOK_AGAIN_S)
        if CLOCK.monotonic() > deadline:
            return False


def _marked(supervisor: str, board: int) -> list[psutil.Process]:
    """What comes from a worker of that supervisor, or of that board, and lives."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(WORKER_MARK, "").startswith(supervisor) or _writes_to(
                process.pid, board
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # a dead one, too: it has no environment any more
        except OSError as error:
            _raise_if_no_room(error)
    return found


def _writes_to(pid: int, inode: int, offset: int | None = None) -> bool:
    """True if a process has a shared mapping of the board's file, from `offset` on, that it may write to (proc(5),
    [pid]/maps)."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            mappings = [line.split(None, 5) for line in maps if b" rw-s " in line]
    except OSError as error:
        _raise_if_no_room(error)
        return False
    return any(
        int(fields[4]) == inode and b"fdpool-board" in fields[5] and offset in (None, int(fields[2], 16))
        for fields in mappings
        if fields[5:]
    )


def _raise_if_no_room(error: OSError) -> None:
    """Raise what says that nobody can look; anything else is said of one process alone."""
    if error.errno in _NO_ROOM:
        raise error


def direct_children() -> set[int]:
    """Process ids of this process's children; one small read where the kernel lists them (proc(5))."""
    found = _platform.child_pids()
    if found is not None:
        return found
    import psutil

    return {child.pid for child in psutil.Process().children()}


def end_with_parent(parent: int) -> None:
    """Have this worker die of SIGHUP, and if `parent` is dead, take everything that descends from it along.

    With `signal_when_parent_dies(SIGHUP)` this is what keeps a killed supervisor from leaving a worker's
    programs behind. Otherwise whoever sent the signal sees to the rest of the tree.
    """

    def on_sighup(number: int, _frame: object) -> None:
        if os.getppid() != parent:
            kill_descendants(limit_s=1.0)
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)

    _signals.set_handler(signal.SIGHUP, on_sighup)


def _reap_if_child(pid: int, deadline: float) -> None:
    """Wait for `pid` if it is a child of ours that was sent SIGKILL; a descendant further down is not."""
    while CLOCK.monotonic() < deadline:
        try:
            reaped, _ = os.waitpid(pid, os.WNOHANG)
        except OSError as error:
            if error.errno != errno.ECHILD:
                raise
            return
        if reaped:
            return
        time.sleep(0.0005)
