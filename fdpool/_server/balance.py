"""How many connections each worker has that accepts from the same listeners, in memory that all of them share; and
which of them is to let others go first.

Whoever wakes up first would accept all of a burst of connections, and on kept ones it is that worker who answers all
that comes for as long as they are kept: of 32 on two workers, 25 to 32 were one's (gunicorn and uvicorn do no better).

A file of one word for each slot, `ABSENT` where nobody accepts.
"""

from __future__ import annotations

import mmap
import os

from .. import _platform
from ..fds import above_stdio, mapped

ABSENT = 0xFFFF_FFFF
_NEIGHBOURS = (
    32  # with so many at most a worker compares: more would be 1 µs for each connection that it looks at
)

#: Who has so many more than another who accepts leads; and of many, who has one in eight more.
LEAD = 4
_LEAD_SHARE = 8
_UNSEEN = (
    8  # connections between two looks where there are many: half a percent of what a quick request costs
)
_MOST_IN_VAIN = 8


class Loads:
    """The server's side. Makes the file, whose descriptor is its own until `close`.

    Args:
        slots: so many there may be.
    """

    def __init__(self, slots: int) -> None:
        self.fd = above_stdio(_platform.anonymous_file("fdpool-loads"))
        try:
            os.ftruncate(self.fd, 4 * slots)
            # Its workers have the descriptor.
            _platform.seal(self.fd, _platform.SEAL_SHRINK | _platform.SEAL_GROW | _platform.SEAL_SEAL)
            self._words = _words(self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        for slot in range(slots):
            self._words[slot] = ABSENT

    def absent(self, slot: int) -> None:
        """Nobody accepts in this slot any more."""
        self._words[slot] = ABSENT

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self.fd >= 0:
            self._words.release()
            fd, self.fd = self.fd, -1  # in this order: a fork may come between
            os.close(fd)


class Balance:
    """The worker's side: of a worker that has many connections open at a time. Not thread-safe: its loop's.

    Args:
        fd: of the server's file; borrowed.
        slot: this worker's.
    """

    def __init__(self, fd: int, slot: int) -> None:
        self._words = _words(fd)
        self._slot: int | None = slot
        first = slot - slot % _NEIGHBOURS
        last = min(first + _NEIGHBOURS, len(self._words))
        self._neighbours = [each for each in range(first, last) if each != slot]
        self.look()
        self._in_vain = 0
        self._unhindered = 0

    def tell(self, connections: int) -> None:
        """So many are open here."""
        if self._slot is not None:
            self._words[self._slot] = connections

    def look(self) -> None:
        """See who there is; every so often."""
        self._others: list[int] = [each for each in self._neighbours if self._words[each] != ABSENT]

    def leads(self, connections: int) -> bool:
        """True if another who accepts has far fewer than so many, which are open here; it is told as by `tell`."""
        return self._more_until_lead(connections) == 0

    def spare(self, connections: int) -> int | None:
        """How many more this worker may take before this is asked again; 0 if it is to let others go first, now; None
        if there are no others.

        Args:
            connections: as for `tell`.
        """
        if not self._others:
            self.look()
        more = self._more_until_lead(connections)
        if more == 0:
            unhindered, self._unhindered = self._unhindered, 0
            return unhindered
        self._in_vain = 0
        return None if more is None else max(more, LEAD, min(_UNSEEN, connections // 2))

    def _more_until_lead(self, connections: int) -> int | None:
        self.tell(connections)
        words = self._words
        least = min([words[other] for other in self._others], default=ABSENT)
        return None if least == ABSENT else max(0, least + max(LEAD, least // _LEAD_SHARE) - connections)

    def leave(self) -> None:
        """Nothing more is taken here: one that comes in this worker's place tells what it has."""
        self._slot = None

    def left_to_others(self, taken: bool) -> None:
        """Whether others have taken what was left to them. Each time in a row that they have not, this worker takes
        twice as many before it lets them go first again."""
        self._in_vain = 0 if taken else min(self._in_vain + 1, _MOST_IN_VAIN)
        self._unhindered = 0 if taken else LEAD << self._in_vain


def _words(fd: int) -> memoryview:
    return memoryview(mapped(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)).cast("I")
