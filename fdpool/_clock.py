"""The clock of all deadlines and measured times, which no test stops.

Who freezes time for a test (freezegun) puts functions of its own in the place of `time`'s wherever a module has a name
for one. A pool or a server that outlives such a test would take its workers for overdue, or wait for ever. So the
kernel's clock is kept where nobody looks for it, in an object; and asked in another way, if time stands still already.
"""

import time
from functools import partial
from types import BuiltinFunctionType


class _Clock:
    """Seconds, and nanoseconds, of the clock that nobody sets; the same in all processes."""

    __slots__ = ("monotonic", "monotonic_ns")

    def __init__(self) -> None:
        self.monotonic = time.monotonic
        self.monotonic_ns = time.monotonic_ns
        if not isinstance(time.monotonic, BuiltinFunctionType):
            self.monotonic = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
            self.monotonic_ns = partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)


CLOCK = _Clock()
