"""Descriptors that tasks hold in the client while they wait, against its limit of open files (RLIMIT_NOFILE).

A descriptor has the lowest number that is free, so its number says how near the limit is: nobody has to count. At the
edge whoever submits waits until a task has let go of some; so the rest of the program does not find the table full.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Sequence

from .errors import DescriptorsExhausted
from .fds import close_all, is_open

#: Numbers that are left to the rest of the program, if the limit is not much smaller than usual.
_RESERVED = 64

#: `errno` of who finds the table full: this process's, or the system's.
FULL = (errno.EMFILE, errno.ENFILE)


def near_limit(numbers: Sequence[int]) -> bool:
    """True if these descriptors, just made, are among the last that there are. Costs a system call."""
    return max(numbers, default=0) >= _edge()


def has_room_for(count: int) -> bool:
    """True if so many descriptors can be opened, and some more, as other threads open files meanwhile.

    The only way to know is to open them: a microsecond for each.
    """
    probes: list[int] = []
    try:
        while len(probes) < count:
            probes.append(os.dup(2))
        return not near_limit(probes)
    except OSError as error:
        return error.errno not in FULL  # there is no stderr: nobody can tell
    finally:
        close_all(probes)


def _edge() -> int:
    """The number from which on descriptors are kept for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - min(_RESERVED, soft // 8)


def exhausted(label: str, held: int, waited_s: float, near: bool = False) -> DescriptorsExhausted:
    """The error for a task that cannot be submitted, as there is no descriptor for it; or, `near` the limit, none but
    those that are kept for others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = f", save {_free_from(_edge())} that are kept for the rest of the program" if near else ""
    waited = f", and none has let go of any for {waited_s:g} seconds" if waited_s else ""
    return DescriptorsExhausted(
        errno.EMFILE,
        f"no descriptor is left for {label}{kept}: this process may have {soft} files open (RLIMIT_NOFILE, "
        f"`ulimit -n`; at most {hard}), {held} tasks that wait, or may be tried again, hold some{waited}. Raise the "
        "limit, close what the program itself has open, or submit fewer at a time",
    )


def _free_from(number: int) -> int:
    """How many descriptors are free, from this number up to the limit; opens none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sum(not is_open(fd) for fd in range(number, soft))
