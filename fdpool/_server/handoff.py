"""dispatch="handoff": the server accepts, and hands each connection to the worker that has least to do.

A worker's inbox is a datagram pair of which the server keeps both ends, as a pool does with its slots. So what a worker
has not taken is never lost with it: it is received here again, unread request and all, and goes to another. The same is
done where a worker takes nothing for a while (it is busy, or stopped) and another could.

    kernel's queue ──accept──► silent ──the client speaks──► held ──send──► a worker's inbox ──► the worker
                                                              ▲                   │ it dies, drains, or takes
                                                              └──── taken back ───┘ nothing for a while
"""

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .. import _messages, _own_sockets, wire
from .._clock import CLOCK
from .._reserve import Reserve
from ..fds import close_all, is_readable
from .accept import Acceptor, off_stdio
from .doors import HANDED
from .silence import Silent, has_room

if TYPE_CHECKING:
    from .link import WorkerLink
    from .turns import Turns

_LOOK_S = 0.1  # how long a worker may leave its inbox alone while others could take
_SLOW_S = 1.0  # how long such a worker is passed over
_RETRY_S = 0.01
_BATCH = 32  # connections accepted before anything else is looked at


class Laden(NamedTuple):
    """A worker, by what it has to do.

    Attributes:
        waiting: connections in its inbox.
        open: those that it has taken, and not closed.
        most: how many of both it may have.
        slow: it has left its inbox alone for a while.
        busy: one more would wait for a thread.
    """

    number: int
    waiting: int
    open: int
    most: int
    slow: bool
    busy: bool = False

    @property
    def load(self) -> int:
        """All that it has."""
        return self.waiting + self.open


def choose(workers: Iterable[Laden], last: int) -> int | None:
    """Who gets the next connection: of those that have a thread free, or else of all, the least laden, in turn among
    equals; None if nobody has room. A connection that is kept is a load, and needs no thread.

    Args:
        last: who got the one before.
    """
    best: tuple[bool, int, bool, int] | None = None
    for worker in workers:
        if not worker.slow and worker.load < worker.most:
            key = (worker.busy, worker.load, worker.number <= last, worker.number)
            best = key if best is None else min(best, key)
    return None if best is None else best[3]


class _Seat:
    """A worker's inbox, both ends."""

    __slots__ = (
        "finished_before",
        "link",
        "mine",
        "most",
        "sent",
        "serves",
        "slow_until",
        "taken_before",
        "theirs",
        "was_busy",
    )

    def __init__(self, link: "WorkerLink") -> None:
        self.link = link
        self.mine, self.theirs = _own_sockets.pair(socket.SOCK_DGRAM)
        self.most = 1
        self.sent = 0
        self.serves = False
        self.slow_until = 0.0
        self.was_busy = False  # as it came to be passed over
        self.taken_before = 0
        self.finished_before = 0

    def laden(self) -> Laden:
        taken, open_now = self.link.load()
        waiting = max(0, self.sent - taken)
        busy = self.link.is_busy(waiting)
        return Laden(self.link.number, waiting, open_now, self.most, self.is_slow, busy)

    @property
    def is_slow(self) -> bool:
        """True if it is passed over for now: until its time is over, or a thread is free that it had to wait for."""
        if self.slow_until and (CLOCK.monotonic() >= self.slow_until or (self.was_busy and not self.is_busy)):
            self.slow_until = 0.0
        return self.slow_until > 0.0

    @property
    def has_waiting(self) -> bool:
        """True if something lies in its inbox."""
        return self.sent > self.link.load()[0]

    @property
    def is_busy(self) -> bool:
        """True if it takes nothing for now because all of its threads have requests."""
        return self.link.is_busy()

    @property
    def could_take(self) -> bool:
        """True if it has room, and nothing waits in its inbox."""
        laden = self.laden()
        return not laden.slow and not laden.waiting and laden.load < laden.most

    @property
    def has_ended_some(self) -> bool:
        """True if requests of it have ended since it was decided to look."""
        return self.link.see().finished != self.finished_before

    def is_later_than(self, other: "_Seat") -> bool:
        """True if what this one has not taken would be taken sooner by `other`.

        If the other's threads are all busy, only where those end requests and its own do not, or where it takes
        nothing although it has had a thread free all the time. Else a connection would leave a worker for one that is
        as busy, and the first be passed over as it gets free, or as it has just got free: for a second.
        """
        if not other.is_busy:
            return True
        return not self.has_ended_some and (other.has_ended_some or not self.is_busy)

    def close(self) -> None:
        self.mine.close()
        self.theirs.close()


def _is_to_be_looked_at(seat: _Seat) -> bool:
    """True if something waits in its inbox, or it is passed over: nobody says when that is over."""
    return seat.has_waiting or (seat.serves and seat.is_slow)


class Handoff:
    """Accepts and hands over. Runs in: the server's thread, all of it.

    Args:
        listeners: borrowed.

    Attributes:
        handed: connections handed over so far.
        taken_back: those that had to be taken back.
    """

    def __init__(self, turns: "Turns", listeners: Sequence[socket.socket]) -> None:
        self._turns = turns
        self._listeners = list(listeners)
        self._seats: dict[int, _Seat] = {}
        self._left: set[_Seat] = set()  # of workers that are gone, and in whose inbox there may be more
        self._silent = Silent(turns, self._spoke)
        self._clients_speak_first = False
        self._held: deque[socket.socket] = deque()
        self._acceptor = Acceptor()
        self._reserve = Reserve()
        self._watched: list[socket.socket] = []  # all listeners, or none
        self._looking = False
        self._last = 0
        self.handed = 0
        self.taken_back = 0

    # -- workers -------------------------------------------------------------------------------------------

    def seat(self, link: "WorkerLink") -> _own_sockets.OwnSocket:
        """Make a worker's inbox; returns the end to give it, borrowed.

        Raises:
            OSError: no descriptors are left, or the kernel has no memory to watch one more.
        """
        seat = _Seat(link)
        try:
            self._turns.watch(seat.mine, partial(self._told, seat))
        except BaseException:
            seat.close()
            raise
        self._seats[link.number] = seat
        return seat.theirs

    def opened(self, number: int, most: int, clients_speak_first: bool) -> None:
        """The worker serves, and may have so many connections at a time, those in its inbox included; it is handed
        those on which there is something to read, if it is its clients who speak first."""
        self._clients_speak_first = clients_speak_first
        self._seats[number].most = most
        self._seats[number].serves = True
        if not clients_speak_first:
            self._held.extend(self._silent.release())
        self._pump()

    def closing(self, number: int) -> None:
        """The worker is to take nothing new: what it has not taken goes to others."""
        seat = self._seats.get(number)
        if seat is not None:
            seat.serves = False
            if not self._take_back(seat):
                self._turns.later(_RETRY_S, partial(self.closing, number))
            self._pump()

    def gone(self, number: int) -> None:
        """The worker is not there any more."""
        seat = self._seats.pop(number, None)
        if seat is not None:
            self._turns.unwatch(seat.mine)
            self._left.add(seat)
            self._empty(seat)

    def _empty(self, seat: _Seat) -> None:
        """Take what lies in the inbox of a worker that is gone, as soon as there is room for it; its page is closed."""
        if seat not in self._left:
            return
        if self._take_back(seat):
            self._left.remove(seat)
            seat.close()
        else:
            self._turns.later(_RETRY_S, partial(self._empty, seat))
        self._pump()

    def close(self) -> None:
        """Accept nothing any more; what nobody could take is closed."""
        self._watch(False)
        for seat in (*self._seats.values(), *self._left):
            seat.close()
        self._seats.clear()
        self._left.clear()
        self._silent.close()
        while self._held:
            self._held.popleft().close()
        self._acceptor.close()
        self._reserve.close()

    def forget(self) -> None:
        """Runs in a forked child: close the copies."""
        # Kernel: a forked child has the same epoll instance (epoll(7)): what it takes from it is the parent's, too.
        self._watched.clear()
        self._acceptor.forget()
        self._reserve.forget()
        self.close()

    @property
    def is_empty(self) -> bool:
        """True if every connection that was accepted, and is not silent, has been taken by a worker."""
        return (
            not self._held and not self._left and not any(seat.has_waiting for seat in self._seats.values())
        )

    def stop(self, leaving: bool) -> None:
        """The server ends: accept nothing more.

        Args:
            leaving: nobody else will answer those who have said nothing. They are idle, and closed as the workers' are;
                to wait until workers have taken them would be to wait for clients. Otherwise it is left to the workers
                how long they listen to them.
        """
        self._watch(False)
        self._listeners = []
        held, self._held = [*self._held, *self._silent.release()], deque()
        for connection in held:
            if leaving and self._clients_speak_first and not is_readable(connection):
                connection.close()
            else:
                self._held.append(connection)
        self._clients_speak_first = False
        self._pump()

    # -- connections ---------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand over what is held, and accept only as long as somebody has room."""
        while self._held and (number := self._who()) is not None:
            if not self._hand_over(self._seats[number], self._held.popleft()):
                break
        room = not self._held and self._who() is not None
        if not room:
            # Asked for a word first, looked at again second: who ends a request does it the other way round.
            self._ask_for_word(True)
            room = not self._held and self._who() is not None
        if room:
            self._ask_for_word(False)
        self._watch(room)
        if not self._looking and (self._held or any(map(_is_to_be_looked_at, self._seats.values()))):
            self._look_later()

    def _look_later(self) -> None:
        self._looking = True
        for seat in self._seats.values():
            if seat.serves:
                seat.finished_before = seat.link.see().finished
        self._turns.later(_LOOK_S, self._look)

    def _who(self) -> int | None:
        serving = (seat.laden() for seat in self._seats.values() if seat.serves)
        return choose(serving, self._last)

    def _hand_over(self, seat: _Seat, connection: socket.socket) -> bool:
        """True if it is in the worker's inbox; else it is held."""
        try:
            sent = wire.try_send(seat.mine, (HANDED,), (connection.fileno(),))
        except OSError as error:
            if error.errno not in _messages.MAY_YET_LAND:
                raise
            sent = False
        if not sent:
            self._held.appendleft(connection)
            self._turns.later(_RETRY_S, self._pump)
            return False
        connection.close()
        self._acceptor.replenish()
        seat.sent += 1
        self._last = seat.link.number
        self.handed += 1
        return True

    def _accept(self, listener: socket.socket) -> None:
        number = None if self._held else self._who()
        for _ in range(_BATCH):
            if number is None:
                break
            connection = self._acceptor.accept(listener)
            if connection is None:
                if self._pauses():
                    return
                break
            if connection.gettimeout() is not None:
                connection.settimeout(None)  # the default of this program: a worker has its own, or none
            if self._clients_speak_first and self._silent.keep(connection):
                continue
            number = self._who() if self._hand_over(self._seats[number], connection) else None
        self._pump()

    def _pauses(self) -> bool:
        """If no descriptor is left, give away those of the silent, and accept nothing for a while; True if so."""
        if self._acceptor.paused_until <= CLOCK.monotonic():
            return False
        self._held.extend(self._silent.release())
        self._pump()
        pause_s = self._acceptor.paused_until - CLOCK.monotonic()
        if pause_s > 0:
            self._watch(False)
            self._turns.later(pause_s, self._pump)
        return True

    def _spoke(self, connection: socket.socket) -> None:
        """There is something to read on a connection that was silent."""
        number = None if self._held else self._who()
        if number is None:
            self._held.append(connection)
            self._pump()
        elif self._hand_over(self._seats[number], connection) and not self._looking:
            self._look_later()

    def _watch(self, wanted: bool) -> None:
        if not wanted:
            while self._watched:
                self._turns.unwatch(self._watched.pop())
        elif not self._watched:
            try:
                for listener in self._listeners:
                    self._turns.watch(listener, partial(self._accept, listener))
                    self._watched.append(listener)
            except OSError:
                # Of what the kernel may watch for this user, others have taken the rest meanwhile.
                self._watch(False)
                self._turns.later(_RETRY_S, self._pump)

    def _ask_for_word(self, wanted: bool) -> None:
        for seat in self._seats.values():
            seat.link.wait_for_end(wanted)

    def _told(self, seat: _Seat) -> None:
        """A worker says that a request of its has ended."""
        while (received := wire.try_receive(seat.mine, 64, 1)) is not None:
            close_all(received.fds)
        self._pump()

    def _look(self) -> None:
        """Take connections from those who leave them alone, if somebody else could have them."""
        self._looking = False
        now = CLOCK.monotonic()
        for seat in list(self._seats.values()):
            taken, _ = seat.link.load()
            stuck = seat.serves and seat.sent > taken == seat.taken_before
            seat.taken_before = taken
            if stuck and self._somebody_else_could(seat):
                seat.slow_until = now + _SLOW_S
                seat.was_busy = seat.is_busy
                self._take_back(seat)
        self._pump()

    def _somebody_else_could(self, seat: _Seat) -> bool:
        others = (each for each in self._seats.values() if each is not seat and each.serves)
        return any(other.could_take and seat.is_later_than(other) for other in others)

    def _take_back(self, seat: _Seat) -> bool:
        """Receive what lies in a worker's inbox, as whoever receives a datagram first owns it; False if more may."""
        while True:
            if self._held and not has_room():
                return False
            # Kernel: a descriptor for which there is no room is lost on receipt (hazard M5). So room is made first.
            if not (self._reserve.give() or (self._reserve.fill() and self._reserve.give())):
                return False
            received = wire.try_receive(seat.theirs, 64, 1)
            if received is not None and received.fds:
                seat.sent -= 1
                self.taken_back += 1
                self._held.append(off_stdio(_own_sockets.adopt(received.fds[0])))
            self._reserve.fill()
            if received is None:
                return True
