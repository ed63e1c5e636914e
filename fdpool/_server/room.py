"""How many descriptors this process may still open, looked at so seldom that it costs next to nothing."""

from __future__ import annotations

import os
import resource

_TAKEN_UNSEEN = 8  # a look at each descriptor would cost a connection 3 %


class Room:
    """Whether a good many descriptors are free.

    Invariant: between two looks no more than a quarter of what is spare is taken by those who ask here; three quarters
    and the margin are for what else the process opens meanwhile.

    Args:
        margin: with so many left, or fewer, it is no longer ample.

    Attributes:
        unseen: so many more may be taken before the next look. Who takes one counts it down, and asks as it gets
            negative.
    """

    def __init__(self, margin: int) -> None:
        self._margin = margin
        self.unseen = 0

    def is_ample(self) -> bool:
        """Look, and say so."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # each time: it may be changed
        if soft == resource.RLIM_INFINITY:
            return True
        try:
            taken = _count()
        except OSError:  # there is none left to look with, or nothing to look at
            return False
        # Those above the limit are counted, too, so there may be more than this, and never fewer.
        spare = soft - taken - self._margin
        # The more there are, the longer a look takes where they have to be listed.
        self.unseen = min(max(_TAKEN_UNSEEN, taken // 8), spare // 4)
        return spare > 0

    def look_again(self) -> None:
        """Look as the next is taken: others have had time to open something."""
        self.unseen = 0


def _count() -> int:
    # Kernel: this folder's size is the number of descriptors since Linux 6.2 (f1f1f2569901), and 0 before.
    try:
        counted = os.stat("/proc/self/fd").st_size
    except FileNotFoundError:
        counted = 0
    return counted or len(os.listdir("/dev/fd"))
