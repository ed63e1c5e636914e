"""Connections that come to an event loop by the worker's door: when they are taken, and how uvicorn gets them.

What is taken is lost with the worker if that is killed, and an event loop begins a request three turns after it has
taken the connection. So of what the server hands over, the next one is taken when the request of the one before has
begun, and it has what its client has sent by then: the server fetches back what is still in the inbox. (To take many in
a turn would spare a quick request on a connection of its own an eighth of its CPU, with uvloop.) From listeners that
are shared several are taken at once where requests are quick, and each by itself where they keep the loop for long
(`pace`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections.abc import Callable
from typing import Any

from .._clock import CLOCK
from .._log import log
from .courtesy import Courtesy
from .doors import Door, HandedOver
from .pace import Pace
from .progress import Progress

_LOGGER = "fdpool.server"
_KEPT_FOR_ONE_MORE = 4
_FIRST_BYTES = 64 * 1024


class Connections(set[Any]):
    """uvicorn's connections. As one goes, its protocol calls `discard` or `remove`: a set's, as long as nobody wants to
    know (to be told costs a connection 1 %).

    Attributes:
        unseen: so many more may come before `look` is called, which says anew how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unseen: float = math.inf
        self.look: Callable[[], float] = lambda: math.inf

    def add(self, connection: Any) -> None:
        # The loop has just accepted it, and no other since (libuv accepts one in a turn). It is the place that costs a
        # connection the least: to have its protocol made by a function of ours, within the call of accept(2), was 2 %.
        set.add(self, connection)
        self.unseen -= 1
        if self.unseen < 0:
            self.unseen = self.look()

    def tell(self, gone: Callable[[], object] | None) -> None:
        """Call `gone()` as one goes, from now on; None: nothing."""
        if gone is None:
            self.__dict__.pop("discard", None)
            self.__dict__.pop("remove", None)
            return

        def discard(connection: Any) -> None:
            set.discard(self, connection)
            gone()

        def remove(connection: Any) -> None:
            set.remove(self, connection)
            gone()

        self.discard, self.remove = discard, remove  # type: ignore[method-assign]


class Intake:
    """Takes connections by the door, from `open` to `close`. Runs in: the loop's thread, all of it.

    Args:
        door: closed by `close`.
        connections: those that uvicorn has.
        begun: says how many requests have begun so far.

    Attributes:
        courtesy: towards other workers, if there may be any.
        one_by_one: the next one is taken when the request of the one before has begun.
    """

    courtesy: Courtesy | None = None

    def __init__(
        self, door: Door, progress: Progress, connections: Connections, begun: Callable[[], int]
    ) -> None:
        self._door = door
        self.one_by_one = isinstance(door, HandedOver)
        self._progress = progress
        self._connections = connections
        self._begun = begun
        self._pace = Pace()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make_protocol: Callable[[], Any] = object
        self._ssl: ssl.SSLContext | None = None
        self._open = 0
        self._granted = 0  # so many more are taken before it is asked whether others are to go first
        self._beginning = 0  # so many requests of connections that were taken are about to
        self._paused: set[int] = set()  # where nothing is taken for a while, as no descriptor is left
        self._adopting: dict[socket.socket, asyncio.Task[None]] = {}  # until TLS has shaken hands

    def __len__(self) -> int:
        """Connections that were taken, and that uvicorn has yet to hear of."""
        return len(self._adopting)

    def open(
        self,
        loop: asyncio.AbstractEventLoop,
        make_protocol: Callable[[], Any],
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        """Begin to take connections."""
        self._loop, self._make_protocol, self._ssl = loop, make_protocol, ssl_context
        self._open = len(self._connections)
        # As one goes, the server hands more by what is counted, and the door has a descriptor in reserve again.
        self._connections.tell(self._one_has_gone)
        self.go_on()

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take no more; safe to call again. What is polled is not to be closed (hazard M27)."""
        if self.courtesy is not None:
            self.courtesy.close()
        for fileno in self._door.filenos():
            loop.remove_reader(fileno)
        self._door.close()

    def rest(self) -> None:
        """Take none, and look after no others, until it is opened again."""
        if self.courtesy is not None:
            self.courtesy.close()
            self.courtesy = None
        self.pause()
        self._paused.clear()

    def count(self) -> int:
        """How many there are, less those that a turn takes at once: it may well have so many more than others."""
        at_once = 1 if self.one_by_one else self._pace.at_once
        return max(0, len(self._connections) + len(self._adopting) - at_once)

    def pause(self) -> None:
        """Take none for now."""
        assert self._loop is not None
        for fileno in self._door.filenos():
            self._loop.remove_reader(fileno)

    def go_on(self) -> None:
        """Take those that come."""
        assert self._loop is not None
        for fileno in self._door.filenos():
            self._loop.add_reader(fileno, self._take, fileno)

    def cut_off(self) -> None:
        """Close connections whose clients have not finished the handshake: uvicorn has yet to hear of those."""
        for task in self._adopting.values():
            task.cancel()

    def _take(self, fileno: int) -> None:
        assert self._loop is not None
        if (pause_s := self._door.pause_s()) > 0:
            self._loop.remove_reader(fileno)
            self._paused.add(fileno)
            self._loop.call_later(pause_s, self._look_again)
        elif self.one_by_one:
            self._take_one(fileno)
        else:
            self._take_several(fileno)

    def _take_one(self, fileno: int) -> None:
        if self._beginning < self._most_beginning() and (connection := self._door.take(fileno)) is not None:
            # With TLS it is the handshake that begins, and that takes as long as the client likes.
            said = _received(connection) if self._ssl is None else b""
            self._beginning += bool(said)
            self._granted -= 1
            self._adopt(connection, said)
            self._let_others_go_first()

    def _most_beginning(self) -> int:
        """Where many keep their connections, what those ask is lost with the worker, too; and as turns take long then,
        whoever comes would wait for long."""
        return 1 if isinstance(self._door, HandedOver) else 1 + len(self._connections) // _KEPT_FOR_ONE_MORE

    def _take_several(self, fileno: int) -> None:
        self._pace.turns(CLOCK.monotonic())
        for _ in range(self._pace.at_once):
            connection = self._door.take(fileno)
            if connection is None:
                self._pace.took_all()
                break
            self._granted -= 1
            self._adopt(connection)
        else:
            self._pace.left_some(CLOCK.monotonic(), self._begun())
        self._let_others_go_first()

    def _let_others_go_first(self) -> None:
        if self.courtesy is not None and self._granted <= 0:
            self._granted = self.courtesy.spare()

    def _look_again(self) -> None:
        assert self._loop is not None
        for fileno in self._paused.intersection(self._door.filenos()):
            self._loop.add_reader(fileno, self._take, fileno)
        self._paused.clear()

    def _adopt(self, connection: socket.socket, said: bytes = b"") -> None:
        assert self._loop is not None
        self._adopting[connection] = self._loop.create_task(self._give_to_uvicorn(connection, said))
        self._count_open()

    async def _give_to_uvicorn(self, connection: socket.socket, said: bytes) -> None:
        """Args:
        said: what was received on it; it goes before what uvicorn receives.
        """
        assert self._loop is not None
        try:
            # asyncio sees to that only where a socket says that it is of TCP, and one that was accepted says what its
            # listener was made with: usually nothing, 0. uvloop does in any case.
            if connection.family != socket.AF_UNIX and connection.proto != socket.IPPROTO_TCP:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            protocol = self._make_protocol()
            if said:
                _begin_with(protocol, said)
            await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=self._ssl)
        except OSError:
            connection.close()  # the client has gone
        except Exception:
            connection.close()
            log(
                _LOGGER,
                logging.ERROR,
                "a connection could not be taken",
                extra={"event": "adopt_failed"},
                exc_info=True,
            )
        finally:
            if said:
                # The loop makes the connection before it wakes us up: what that has scheduled, the request, has begun.
                self._beginning -= 1
            del self._adopting[connection]
            self._count_open()

    def _one_has_gone(self) -> None:
        # After this turn: one that becomes a WebSocket goes, and comes again at once.
        assert self._loop is not None
        self._loop.call_soon(self._count_open)
        if self.courtesy is not None:
            self.courtesy.one_has_gone()

    def _count_open(self) -> None:
        before = self._open
        self._open = len(self._connections) + len(self._adopting)
        self._progress.has_open(self._open)
        if self._open < before:
            self._door.ended()
            if self._paused and not self._door.pause_s():
                self._look_again()


def _received(connection: socket.socket) -> bytes:
    """What has come already; nothing at the client's end, of which uvicorn hears as it reads."""
    try:
        return connection.recv(_FIRST_BYTES, socket.MSG_DONTWAIT)
    except OSError:
        return b""


def _begin_with(protocol: Any, said: bytes) -> None:
    """Have the protocol get `said` as soon as its connection is made."""
    made = protocol.connection_made

    def made_and_received(transport: Any) -> None:
        del protocol.connection_made
        made(transport)
        protocol.data_received(said)

    protocol.connection_made = made_and_received
