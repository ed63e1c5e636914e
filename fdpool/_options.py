"""What `Pool.with_options` can say of a task: how long it may wait and run, how often it is tried, and its name."""

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsIndex


class TaskOptions(NamedTuple):
    """Options of a task; the defaults are what a task without any has.

    Attributes:
        timeout: seconds that it may run, counted from its start in a worker.
        queue_timeout: seconds from submit within which it must have begun.
        retries: how often it is tried again after its worker died or its time was up.
        retry_delay: seconds before the first of these, twice as many before each further one.
        max_memory: bytes of resident memory that its worker, with all that descends from it, may have meanwhile.
        grace: seconds from SIGTERM to SIGKILL for a worker that is ended for its task's sake.
        name: what errors, warnings and statistics call it; None for the function's name.
    """

    timeout: float | None = None
    queue_timeout: float | None = None
    retries: int = 0
    retry_delay: float = 0.1
    max_memory: int | None = None
    grace: float = 1.0
    name: str | None = None

    @property
    def is_watched(self) -> bool:
        """True if somebody has to look after a task while it runs."""
        return self.timeout is not None or self.max_memory is not None

    def delay_s(self, attempts: int) -> float:
        """Seconds to wait after so many failed attempts."""
        return min(self.retry_delay * 2.0 ** min(attempts - 1, 16), max(LONGEST_DELAY_S, self.retry_delay))


LONGEST_DELAY_S = 30.0


def changed(options: TaskOptions | None, changes: Mapping[str, Any]) -> TaskOptions:
    """`options` with these changes, checked.

    Raises:
        TypeError, ValueError: a value is of no use.
    """
    for name, value in changes.items():
        _check(name, value)
    return (options or TaskOptions())._replace(**changes)


def _check(name: str, value: object) -> None:
    if name in ("timeout", "queue_timeout"):
        if value is not None:
            check_seconds(name, value, zero=False)
    elif name in ("retry_delay", "grace"):
        check_seconds(name, value, zero=True)
    elif name == "retries":
        check_count(name, value, 0)
    elif name == "max_memory":
        if value is not None:
            check_count(name, value, 1)
    elif value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None, not {value!r}")


def check_seconds(name: str, value: object, zero: bool) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number of seconds, positive or, with `zero`, 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can be
        is_finite = False
    if not is_finite or value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise ValueError(f"{name} must be a finite number of seconds, {least}, not {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")


def whole_number(name: str, value: SupportsIndex) -> int:
    """`value` as an int, which may be of any type that is a whole number, such as NumPy's; else TypeError."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
