"""How many connections an event loop takes in one turn: as many as it begins in two milliseconds; and whether to take
none before the one before has begun.

Several that are taken in one turn share what it costs: with one in each turn a quick request on a connection of its own
takes up to a third more. But what is taken is lost with its worker if that is killed, and no other can have it; and an
event loop begins a request some four turns after it has taken the connection. So where requests compute, each turn
takes one; and where they keep the loop for long, the next one is taken when the one before has begun.

Pure. Not thread-safe: the loop's.
"""

from __future__ import annotations

from collections import deque

_MOMENT_S = 0.002
_WHILE_S = 0.05
_MOST = 32  # of eight each costs a quick request 4 % more
_LONG_S = 0.001  # with uvloop, to take each by itself costs a fortieth of it
_TURNS = 3  # where others want the processors, one of so many is hardly kept from them


class Pace:
    """Looks at how soon requests are begun while there are more than were taken.

    Attributes:
        at_once: so many are to be taken in the next turn.
    """

    def __init__(self) -> None:
        self.at_once = 1
        self._since: tuple[float, int] | None = None  # moment, and requests begun until then
        self._last_turn = 0.0

    def turns(self, now: float) -> None:
        """A turn is about to take some. After a while without any, nobody knows how long requests take, and of a burst
        of connections others are to have their share."""
        if now - self._last_turn > _WHILE_S:
            self.at_once = 1
        self._last_turn = now

    def left_some(self, now: float, begun: int) -> None:
        """A turn has taken all that it may, and there may be more, so that the next one does not wait for anything.

        Args:
            begun: requests begun so far.
        """
        if self._since is None:
            self._since = now, begun
        elif begun > self._since[1]:
            # Until one is begun, turns say nothing of how long requests take.
            moments = max((now - self._since[0]) / _MOMENT_S, 1 / _MOST)
            self.at_once = min(_MOST, max(1, int((begun - self._since[1]) / moments)))
            self._since = now, begun

    def took_all(self) -> None:
        """There are no more for now: time that passes from here on may be idle."""
        self._since = None


class Weight:
    """Looks, every so often, at how long requests keep the loop from others."""

    def __init__(self) -> None:
        self._long = False
        self._since: tuple[float, int] | None = None  # processor time, and requests begun until then
        self._turns: deque[float] = deque(maxlen=_TURNS)

    def took(self, turn_s: float, begun: int) -> None:
        """A turn of the loop took so long, in which so many requests have begun: so it shows if they wait in the loop
        for something."""
        if begun:
            self._turns.append(turn_s / begun)

    def is_long(self, cpu_s: float, begun: int) -> bool:
        """Whether a request keeps the loop for long, by those that have begun since this was last asked.

        Args:
            cpu_s: processor time that the loop's thread has had so far.
            begun: requests begun so far.
        """
        if self._since is not None and begun > self._since[1]:
            each_s = (cpu_s - self._since[0]) / (begun - self._since[1])
            if len(self._turns) == _TURNS:
                each_s = max(each_s, min(self._turns) / 2)
            self._long = each_s > (_LONG_S / 2 if self._long else _LONG_S)
        self._since = cpu_s, begun
        return self._long
