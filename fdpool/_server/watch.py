"""What the server looks for in its workers every so often: requests that do not end, memory, workers that were stopped.

A look costs a read of the page that a worker writes, and where memory is limited or a worker seems still, one of its
/proc files. What is found is judged by `judge`, which is pure.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from .._clock import CLOCK
from .apps import HTTP
from .progress import Seen

if TYPE_CHECKING:
    from .link import WorkerLink

_LOOK_S = 0.5
_LATE_S = 1.0  # who looks so much later than it was to has stood still itself, as all may have here
_MOST_STOPPED_S = 10.0  # how long a worker may be stopped (SIGSTOP), if requests have no limit
_SLOW_S = 30.0  # without moving on, which the log is to say even if nothing has a limit


class Verdict(Enum):
    """What is wrong with a worker."""

    STUCK = "stuck"  # to be killed
    LARGE = "large"  # to be replaced
    SLOW = "slow"  # worth a word in the log


class Finding(NamedTuple):
    """A worker with which something is wrong, and what."""

    number: int
    verdict: Verdict
    why: str = ""


def judge(seen: Seen, now: float, request_timeout_s: float | None, awake_s: float = math.inf) -> str | None:
    """Why a worker that has got so far is stuck, or None.

    Args:
        awake_s: for so long it may have moved on.
    """
    if request_timeout_s is None or min(seen.stuck_s(now), awake_s) <= request_timeout_s:
        return None
    return f"{how_long(seen, now)}, and request_timeout={request_timeout_s:g}"


def how_long(seen: Seen, now: float) -> str:
    """What has not moved on, and for how long."""
    what = "its event loop has not turned" if seen.oldest is None else "a request has not moved on"
    return f"{what} for {seen.stuck_s(now):.1f} seconds"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


class Watch:
    """Looks at workers, at times of its own.

    Args:
        request_timeout_s: how long a request, or an event loop, may go without moving on.
        max_memory: bytes of resident memory above which a worker is replaced.

    Attributes:
        next_look: when `look` is due.
    """

    def __init__(self, request_timeout_s: float | None, max_memory: int | None) -> None:
        self._request_timeout_s = request_timeout_s
        self._max_memory = max_memory
        self._pause_s = (
            _LOOK_S if request_timeout_s is None else min(_LOOK_S, max(0.02, request_timeout_s / 4))
        )
        self._retired: set[int] = set()
        self._told: dict[
            int, float
        ] = {}  # of slow workers, the moment since which they were when the log was told
        self.next_look: float | None = CLOCK.monotonic() + self._pause_s
        # Before, everything may have stood still: a control group that was frozen, a machine that was stopped.
        self._awake_since = -math.inf

    def look(self, links: "Sequence[WorkerLink]", now: float) -> Iterator[Finding]:
        """If it is time, the workers with which something is wrong."""
        if self.next_look is None or now < self.next_look:
            return
        if now > self.next_look + _LATE_S:
            self._awake_since = now
        self.next_look = now + self._pause_s
        awake_s = now - self._awake_since
        for link in links:
            if link.lost or (link.ready_at is None and not (link.stands_by or link.called)):
                continue
            seen = link.see()
            why = judge(seen, now, self._request_timeout_s, awake_s) or self._stopped(link, now)
            if why is not None:
                yield Finding(link.number, Verdict.STUCK, why)
            elif (size := self._too_large(link, seen)) is not None:
                self._retired.add(link.number)
                yield Finding(link.number, Verdict.LARGE, size)
            elif self._is_slow(link, seen, now):
                yield Finding(link.number, Verdict.SLOW, how_long(seen, now))

    def forget(self, number: int) -> None:
        """The worker has gone."""
        self._retired.discard(number)
        self._told.pop(number, None)

    def _is_slow(self, link: "WorkerLink", seen: Seen, now: float) -> bool:
        """True once for each time that it stands still."""
        since = now - seen.stuck_s(now)
        if now - since <= _SLOW_S or link.interface not in HTTP:
            return False
        known = self._told.get(link.number, -math.inf)
        self._told[link.number] = since
        return since - known > _SLOW_S / 2

    def _too_large(self, link: "WorkerLink", seen: Seen) -> str | None:
        """How large it is and may be, if that is too large and nobody has been told."""
        if self._max_memory is None or link.number in self._retired:
            return None
        size = resident_bytes(link.pid)
        if size is None or size <= self._max_memory:
            return None
        why = f"it has {_mebibytes(size)} of memory, and max_memory is {_mebibytes(self._max_memory)}"
        # What accepts for itself does not say what it serves.
        is_new = seen.begun == 0 and link.interface != "listeners"
        return f"{why}, less than a worker has that serves nothing yet" if is_new else why

    def _stopped(self, link: "WorkerLink", now: float) -> str | None:
        """Why it must go, if it has been stopped for too long. One that a debugger has stopped is left alone."""
        if not is_stopped(link.pid):
            link.stopped_since = None
            return None
        if link.stopped_since is None:
            link.stopped_since = now
        most_s = _MOST_STOPPED_S if self._request_timeout_s is None else self._request_timeout_s
        stopped_s = now - link.stopped_since
        return f"it has been stopped (SIGSTOP) for {stopped_s:.1f} seconds" if stopped_s > most_s else None


if sys.platform == "linux":  # where two of its files say it, and psutil is 17 ms of a server's start

    def resident_bytes(pid: int | None) -> int | None:
        """The resident memory of a process, what it shares with others included; None if it has gone."""
        try:
            return None if pid is None else int(_read(pid, "statm").split()[1]) * os.sysconf("SC_PAGESIZE")
        except OSError:  # or no descriptor is left to look with
            return None

    def is_stopped(pid: int | None) -> bool:
        """True if a process is stopped by a signal."""
        try:
            # proc_pid_stat(5): after its name, which may hold anything; "t" is one that a debugger has stopped.
            return pid is not None and _read(pid, "stat").rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False

    def _read(pid: int, name: str) -> bytes:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.readall()

else:
    import psutil  # here, and not where it is first needed: there may be no descriptor left to import it with

    def resident_bytes(pid: int | None) -> int | None:
        """The resident memory of a process, what it shares with others included; None if it has gone."""
        try:
            return None if pid is None else int(psutil.Process(pid).memory_info().rss)
        except (psutil.Error, OSError):  # OSError: no descriptor is left to look with
            return None

    def is_stopped(pid: int | None) -> bool:
        """True if a process is stopped by a signal."""
        try:
            return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
        except (psutil.Error, OSError):
            return False
