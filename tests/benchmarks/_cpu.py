"""CPU time and memory of a tree of processes; CPU in nanoseconds where the kernel has them.

Ticks of /proc/<pid>/stat are 10 ms, too coarse for short rounds. Each process has a clock of its own, which counts
the nanoseconds of all its threads, those that have ended included (clock_getcpuclockid(3)); its number follows
from the pid (CPUCLOCK_SCHED of linux/posix-timers.h). Children that were reaped are in their parent's account: in
microseconds for this process (getrusage(2)), in ticks for the others.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> Iterator[int]:
    """`pid` and all that descends from it."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def tree_cpu_s() -> float:
    """CPU seconds of this process and its tree until now; this process's are read first, as looking costs some."""
    own = time.process_time()
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own + reaped.ru_utime + reaped.ru_stime
    for pid in tree(os.getpid()):
        if pid != os.getpid():
            total += _cpu_s(pid)
    return total


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has just been reaped, and is in its parent's account next time
    utime, stime, cutime, cstime = (int(field) / _TICKS for field in fields[11:15])
    try:
        own = time.clock_gettime_ns((~pid << 3) | 2) / 1e9
    except OSError:
        own = utime + stime  # a zombie
    return own + cutime + cstime


class Meter:
    """A `with` block's `wall_s`, and `cpu_s` of the whole tree."""

    wall_s: float
    cpu_s: float

    def __enter__(self) -> Meter:
        self.cpu_s = -tree_cpu_s()
        self.wall_s = -time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += tree_cpu_s()


def uss(pid: int) -> int:
    """Bytes that would be free if this process were not there."""
    import psutil  # 40 ms, which a fresh client need not have

    return int(psutil.Process(pid).memory_full_info().uss)


def tree_pss() -> int:
    """Bytes of this process and its tree, each page counted once."""
    import psutil

    return sum(int(psutil.Process(pid).memory_full_info().pss) for pid in tree(os.getpid()))
