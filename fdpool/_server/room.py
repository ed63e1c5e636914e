"""How many descriptors this process may still open, looked at so seldom that it costs next to nothing."""

from __future__ import annotations

import os
import resource

_TAKEN_UNSEEN = 8  # a look at each descriptor would cost a connection 3 %
_SHARE_UNSEEN = 32  # of what is spare: where that is much, one in eight is more than is needed


# With waitress each costs a turn of the loop 0.5 us.
_MOST_IN_TURNS = 1000
_LEFT_TO_THE_APPLICATION = 256


def for_connections() -> int:
    """How many connections a WSGI worker may have open, the idle ones included."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _MOST_IN_TURNS * 2 if soft == resource.RLIM_INFINITY else soft
    return max(100, min(_MOST_IN_TURNS, soft - _LEFT_TO_THE_APPLICATION))


def unseen(margin: int) -> int:
    """Look, and say how many descriptors may be taken before the next look; -1 if no more than `margin` are left.

    No more than a quarter of what is spare is taken between two looks by those who ask here; three quarters and the
    margin are for what else the process opens meanwhile.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # each time: it may be changed
    if soft == resource.RLIM_INFINITY:
        return _TAKEN_UNSEEN  # it may be set meanwhile
    try:
        taken = _count()
    except OSError:  # there is none left to look with, or nothing to look at
        return -1
    # Those above the limit are counted, too, so there may be more than this, and never fewer.
    spare = soft - taken - margin
    if spare <= 0:
        return -1
    # The more are open, the longer a look takes where they have to be listed.
    return min(max(_TAKEN_UNSEEN, taken // 8, spare // _SHARE_UNSEEN), spare // 4)


def _count() -> int:
    # Kernel: this folder's size is the number of descriptors since Linux 6.2 (f1f1f2569901), and 0 before.
    try:
        counted = os.stat("/proc/self/fd").st_size
    except FileNotFoundError:
        counted = 0
    return counted or len(os.listdir("/dev/fd"))
