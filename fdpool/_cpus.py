"""How many processors this process may really use: its affinity, and its cgroup's quota."""

from __future__ import annotations

import os

_CGROUP_ROOT = "/sys/fs/cgroup"


def usable_cpus(cgroup_root: str = _CGROUP_ROOT, membership: str = "/proc/self/cgroup") -> int:
    """At least 1: the least of the affinity mask and every CPU quota above this process.

    Where Python has `os.process_cpu_count` (3.13) its answer is taken for the affinity, so that
    PYTHON_CPU_COUNT and -X cpu_count are honoured. The quota is cpu.max of cgroup v2 or
    cpu.cfs_quota_us of v1, along the whole path, since a parent's quota binds its children
    (cgroups(7)); a fraction of a processor counts as one more.
    """
    if hasattr(os, "process_cpu_count"):
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota in _quotas(cgroup_root, membership):
        count = min(count, max(1, -(-quota[0] // quota[1])))
    return max(1, count)


def _quotas(root: str, membership: str) -> list[tuple[int, int]]:
    """(quota, period) in microseconds, for each cgroup on the way from the root to ours that has one."""
    found = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, v2 = root, True
        elif "cpu" in controllers.split(","):
            base, v2 = os.path.join(root, controllers), False
            if not os.path.isdir(base):
                base = os.path.join(root, "cpu")
        else:
            continue
        folder = base
        for name in ["", *filter(None, path.split("/"))]:
            folder = os.path.join(folder, name) if name else base
            if v2:
                words = _read(os.path.join(folder, "cpu.max")).split()
            else:
                words = [
                    *_read(os.path.join(folder, "cpu.cfs_quota_us")).split(),
                    *_read(os.path.join(folder, "cpu.cfs_period_us")).split(),
                ]
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
                found.append((int(words[0]), int(words[1])))
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""
