"""A short wait on the processor before a long one in the kernel: where it pays, and for how long.

Waking a processor that sleeps takes 50 to 100 microseconds on a virtual machine, and what an answer takes
is often less. So who expects a message looks for it a few dozen times, giving way to whoever else wants the
processor in between, before blocking.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from ._clock import CLOCK

T = TypeVar("T")

#: How long to look, in seconds: about what blocking and being woken costs both sides. Round trips on idle processors,
#: median of 60 rounds: 330 microseconds with 60 here, 180 with 100, 150 with 150 and more, 420 without.
SPIN_S = 200e-6

#: Giving way took that long, so somebody else has run: the processors are wanted, and who blocks is woken sooner than
#: who waits for a turn.
_CROWDED_S = 15e-6

_CREDIT = 8  # misses that end it
_LONGEST_PENALTY = 256  # messages after which to try again, where the processors were wanted again and again

_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


class Spin:
    """One place where somebody waits, and whether looking first has paid there lately.

    Looking costs at most `SPIN_S` of processor time a message. Where messages come more slowly than that, or the
    processors are busy with others, a few misses end it, until a message has come that looking would have met.
    """

    __slots__ = ("_blocked_at", "_credit", "_penalty")

    def __init__(self) -> None:
        self._credit = 1
        self._penalty = 1
        self._blocked_at = 0.0

    def look(self, ready: Callable[[int], T]) -> T | None:
        """Call `ready(0)` until what it returns is true, for `SPIN_S` at most; returns that, or None.

        To be followed, if None, by waiting in the kernel, and then by `waited()`.
        """
        found = ready(0)
        if found:
            return found
        clock = CLOCK.monotonic
        now = clock()
        if self._credit > 0:
            ends = now + SPIN_S
            while now < ends:
                before = now
                _yield()
                found = ready(0)
                now = clock()
                if found:
                    if now - before < _CROWDED_S:
                        self._credit, self._penalty = _CREDIT, max(1, self._penalty // 2)
                    return found
                if now - before > _CROWDED_S:
                    self._penalty = min(2 * self._penalty, _LONGEST_PENALTY)
                    self._credit = 1 - self._penalty
                    break
            self._credit -= 1
        self._blocked_at = now
        return None

    def waited(self) -> None:
        """What was waited for in the kernel has come: was it soon?"""
        if self._credit <= 0 and CLOCK.monotonic() - self._blocked_at < 2 * SPIN_S:
            self._credit += 1
