"""A worker lets others take connections first as long as it has more of them than another has.

    takes ──it leads──► stands back ──one comes──► gives others a head start ──they have it──► stands back
      ▲                      │                               │ it is still there
      └──────────────────────┴ it leads no more ─────────────┘

So a connection is taken two milliseconds later at most; and where others do not take what is left to them (they
compute, or have as much as they can take), a worker stands back ever more seldom. It stands back no longer than it
leads: of quick requests, each on a connection of its own, a worker has four more than another for moments, 140 times a
second, and to stand back for two milliseconds each time cost a twentieth of what it could serve.

Runs in: the thread of the worker's loop, all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._clock import CLOCK
from ..fds import is_readable
from .balance import LEAD, Balance

if TYPE_CHECKING:  # 1 MiB, which a WSGI worker need not have
    import asyncio

_HEAD_START_S = 0.002
_LOOK_S = 0.1
_LOOK_ANYWAY = 8  # connections after which one that was alone looks for others


class Courtesy:
    """Of an asyncio loop that is told of what it has accepted.

    Args:
        filenos: of the listeners; borrowed, and not to be closed before `close`.
        count: says how many connections this worker has.
        stop, go_on: have it take connections no longer, or again.
    """

    def __init__(
        self,
        balance: Balance,
        loop: asyncio.AbstractEventLoop,
        filenos: Sequence[int],
        count: Callable[[], int],
        stop: Callable[[], object],
        go_on: Callable[[], object],
    ) -> None:
        self._balance = balance
        self._loop = loop
        self._filenos = list(filenos)
        self._count = count
        self._stop = stop
        self._go_on = go_on
        self._watched = False
        self._head_start: asyncio.TimerHandle | None = None
        self._stands_back = False
        self._closed = False

    def spare(self) -> int:
        """How many connections to take before this is called again. At 0 it stands back, and `stop` was called."""
        if self._closed:
            return _LOOK_ANYWAY
        spare = self._balance.spare(self._count())
        if spare == 0 and not self._stands_back:
            self._stands_back = True
            self._stop()
            self._watch(True)
        return _LOOK_ANYWAY if spare is None else spare

    def beat(self) -> None:
        """Every so often: connections have ended, here and elsewhere."""
        if self._closed:
            return
        self._balance.look()
        if not self._balance.leads(self._count()):
            self._take_again()

    def one_has_gone(self) -> None:
        """This worker has one fewer; needs to be called while it stands back."""
        if self._stands_back and not self._balance.leads(self._count()):
            self._take_again()

    def close(self) -> None:
        """Look no more, and call nobody. Safe to call again."""
        self._closed = True
        self._end_wait()

    def _watch(self, wanted: bool) -> None:
        if self._watched == wanted:
            return
        self._watched = wanted
        for fileno in self._filenos:
            if wanted:
                self._loop.add_reader(fileno, self._one_has_come)
            else:
                self._loop.remove_reader(fileno)

    def _one_has_come(self) -> None:
        self._watch(False)
        if self._head_start is None:
            self._head_start = self._loop.call_later(_HEAD_START_S, self._look_again)

    def _look_again(self) -> None:
        self._head_start = None
        if not self._balance.leads(self._count()):
            self._take_again()
            return
        taken = not any(map(is_readable, self._filenos))
        self._balance.left_to_others(taken)
        if taken:
            self._watch(True)
        else:
            self._take_again()

    def _take_again(self) -> None:
        if self._stands_back:
            self._end_wait()
            self._go_on()

    def _end_wait(self) -> None:
        self._stands_back = False
        self._watch(False)
        if self._head_start is not None:
            self._head_start.cancel()
            self._head_start = None


class PolledCourtesy:
    """Of a loop that asks whether to poll its listeners, and whether to take what has come.

    Args:
        filenos: of the listeners; borrowed.
        count: says how many connections this worker has.
        threads: it takes connections as it has threads free for them; so what counts is how many more there are.
    """

    def __init__(
        self, balance: Balance, filenos: Sequence[int], count: Callable[[], int], threads: int
    ) -> None:
        self._balance = balance
        self._filenos = list(filenos)
        self._count = count
        self._threads = threads
        self._next_look = 0.0
        self._head_start_until: float | None = None
        self._granted = 0  # so many more are taken, whatever others have
        self.tell()

    def tell(self) -> None:
        """Have others know how many this worker has."""
        self._balance.tell(self._more())

    def leaves_it(self) -> bool:
        """True if one that has come is left to others for now."""
        if self._granted:
            self._granted -= 1
            return False
        more = self._more()
        if more < LEAD:
            return False  # whatever others have
        now = CLOCK.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._balance.look()
        spare = self._balance.spare(more)
        if spare == 0:
            self._head_start_until = now + _HEAD_START_S
            return True
        self._granted = 0 if spare is None else spare - 1
        return False

    def pause_s(self) -> float:
        """For how long others have a head start; 0.0 if they have none, or this worker does not lead any more."""
        if self._head_start_until is None:
            return 0.0
        if self._balance.leads(self._more()):
            left_s = self._head_start_until - CLOCK.monotonic()
            if left_s > 0:
                return left_s
            self._balance.left_to_others(taken=not any(map(is_readable, self._filenos)))
        self._head_start_until = None
        return 0.0

    def _more(self) -> int:
        return max(0, self._count() - self._threads)
