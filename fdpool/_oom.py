"""Whether the kernel's out-of-memory killer is behind a SIGKILL: the control group's own count says so (cgroups(7)).

Runs in: the supervisor, which has been told of every SIGKILL that the pool itself sends.
"""

from __future__ import annotations

import os
import signal
import time

_TOGETHER_S = 5.0  # within which those that were killed together have all been looked at


class Witness:
    """Remembers how many processes of this control group the kernel had killed for want of memory.

    Args:
        root: where control groups are mounted.
        own: the file that says in which of them this process is.
    """

    def __init__(self, root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> None:
        self._root = root
        self._own = own
        self._known = self._kills()
        self._unexplained = 0  # kills that were counted, and whose victim nobody has asked about yet
        self._asked_at = 0.0

    def explain(self, number: int) -> str:
        """Who may have sent a worker the signal `number`, which the pool did not send; "" if nobody knows."""
        if number != signal.SIGKILL:
            return ""
        before, self._known = self._known, self._kills()
        if self._known is None or before is None:
            return "not by the pool; perhaps by the kernel for want of memory, see `dmesg`"
        now = time.monotonic()
        if now - self._asked_at > _TOGETHER_S:
            self._unexplained = 0  # others have died, of whom we know nothing
        self._asked_at = now
        self._unexplained += self._known - before
        if self._unexplained > 0:
            self._unexplained -= 1
            return "by the kernel's out-of-memory killer, as its control group counts: it held too much"
        return "not by the pool, nor for want of memory, as far as its control group counts"

    def _kills(self) -> int | None:
        """How many so far; None if nobody says. Version 2 of control groups, then version 1."""
        try:
            with open(self._own, encoding="utf-8") as listing:
                groups = [line.rstrip("\n").split(":", 2) for line in listing]
        except (OSError, ValueError):
            return None
        for _, controllers, path in (group for group in groups if len(group) == 3):
            if controllers == "":
                found = _read_count(os.path.join(self._root, path.lstrip("/"), "memory.events"))
            elif "memory" in controllers.split(","):
                found = _read_count(
                    os.path.join(self._root, "memory", path.lstrip("/"), "memory.oom_control")
                )
            else:
                continue
            if found is not None:
                return found
        return None


def _read_count(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as events:
            for line in events:
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    except (OSError, ValueError):
        pass
    return None
