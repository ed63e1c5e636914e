"""Whether the kernel's out-of-memory killer may be behind a SIGKILL: what the control group counts (cgroups(7)).

The count does not say who was killed: it may be a task's program, or anything else in the group. So it is taken often,
and what is told is how far it has risen, and since when; never more.

Runs in: the supervisor, which has been told of every SIGKILL that the pool itself sends.
"""

from __future__ import annotations

import os
import signal

from ._clock import CLOCK

_TOGETHER_S = 5.0  # within which those that were killed together have all been asked about
_RECENT_S = 1.0


class Witness:
    """Remembers how many processes of this control group the kernel had killed for want of memory.

    Args:
        root: where control groups are mounted.
        own: the file that says in which of them this process is.
    """

    def __init__(self, root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> None:
        self._root = root
        self._own = own
        self._known = self._kills()  # None as long as nobody has said
        self._looked_at = self._since = self._rose_at = CLOCK.monotonic()
        self._risen = 0  # how many were counted between `_since` and `_rose_at`
        self._unexplained = 0  # of these, whose victim nobody has asked about yet

    def look(self) -> bool:
        """Count anew, so that what was counted by now is not put down to a later death; False if nobody says.

        20 to 80 microseconds.
        """
        now = CLOCK.monotonic()
        if now - self._rose_at > _TOGETHER_S:
            self._risen = self._unexplained = 0  # others have died, of whom we know nothing
        known, kills = self._known, self._kills()
        if kills is None:
            return False
        risen = 0 if known is None else kills - known
        if risen > 0:  # it is another count where this process has been moved to another group
            if not self._risen:
                self._since = self._looked_at
            self._risen += risen
            self._unexplained += risen
            self._rose_at = now
        self._known, self._looked_at = kills, now
        return known is not None

    def look_at_times(self) -> None:
        """`look`, but for the second after a look: many workers start one after the other."""
        if CLOCK.monotonic() - self._looked_at > _RECENT_S:
            self.look()

    def explain(self, number: int) -> str:
        """Who may just have sent a worker the signal `number`, which the pool did not send; "" if nobody knows."""
        if number != signal.SIGKILL:
            return ""
        if not self.look():
            return "not by the pool; perhaps by the kernel for want of memory, see `dmesg`"
        if self._unexplained > 0:
            self._unexplained -= 1
            kills = "a kill" if self._risen == 1 else f"{self._risen} kills"
            return (
                f"perhaps by the kernel's out-of-memory killer: its control group counted {kills} for want of memory "
                f"in the last {_in_words(CLOCK.monotonic() - self._since)}"
            )
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


def _in_words(seconds: float) -> str:
    for name, unit_s in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{max(seconds, 0.1):.1f} seconds"
