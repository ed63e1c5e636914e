"""Where a server worker's connections come from: listeners that it shares, or the server's hand.

Runs in: a server worker. A door is polled by whoever serves; `take` never waits.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Protocol

from .. import _own_sockets, wire
from .._clock import CLOCK
from .._log import log
from .._reserve import Reserve
from ..fds import close_all
from .accept import Acceptor
from .balance import Balance
from .progress import Progress

_LOGGER = "fdpool.server"

#: What the server writes before each connection, and the worker when a request has ended.
HANDED = b"c"
ENDED = b"e"

_PAUSE_S = 0.05  # where no descriptor is left


class Door(Protocol):
    """A source of connections.

    Attributes:
        balance: with the others who take from it, if there may be any, and it is wanted.
    """

    balance: Balance | None

    def filenos(self) -> list[int]:
        """What to poll for reading; empty once closed."""

    def take(self, fileno: int) -> socket.socket | None:
        """A connection that has come by this descriptor, the caller's to close; None if there is none now."""

    def pause_s(self) -> float:
        """For how long there is no use in trying."""

    def ended(self) -> None:
        """A connection has been closed. Thread-safe enough: a wake-up too many does no harm."""

    def close(self) -> None:
        """Take no more; safe to call again. Never a `shutdown`: listeners are shared."""


class Listening:
    """Listeners that others accept from as well; owned."""

    def __init__(self, listeners: Sequence[socket.socket], balance: Balance | None = None) -> None:
        self.balance = balance
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._acceptor = Acceptor()

    def filenos(self) -> list[int]:
        return list(self._listeners)

    def take(self, fileno: int) -> socket.socket | None:
        listener = self._listeners.get(fileno)
        return None if listener is None else self._acceptor.accept(listener)

    def pause_s(self) -> float:
        return max(0.0, self._acceptor.paused_until - CLOCK.monotonic())

    def ended(self) -> None:
        self._acceptor.replenish()

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._listeners = {}
        if self.balance is not None:
            self.balance.leave()
        self._acceptor.close()


class HandedOver:
    """The worker's end of a datagram pair; owned. One datagram is one connection.

    What is not taken stays in the kernel's queue, where the server can fetch it back.
    """

    balance: Balance | None = None

    def __init__(self, fd: int, progress: Progress) -> None:
        self._inbox: _own_sockets.OwnSocket | None = _own_sockets.own(fd)
        self._progress = progress
        self._reserve = Reserve()
        self._paused_until = 0.0

    def filenos(self) -> list[int]:
        return [] if self._inbox is None else [self._inbox.fileno()]

    def take(self, fileno: int) -> socket.socket | None:
        if self._inbox is None:
            return None
        # Kernel: a descriptor for which there is no room is lost on receipt (hazard M5). So room is made first.
        if not (self._reserve.give() or (self._reserve.fill() and self._reserve.give())):
            self._paused_until = CLOCK.monotonic() + _PAUSE_S
            return None
        received = wire.try_receive(self._inbox, 64, 1)
        if not received or not received.fds:
            self._reserve.fill()
        if received is None or not received.data:
            return None
        if len(received.fds) != 1 or received.fds_lost:
            close_all(received.fds)
            self._progress.took()
            log(
                _LOGGER,
                logging.ERROR,
                "process %d lost a connection that it was handed: no descriptor was left (RLIMIT_NOFILE)",
                os.getpid(),
                extra={"event": "connection_lost"},
            )
            return None
        self._progress.took()
        return socket.socket(fileno=received.fds[0])

    def pause_s(self) -> float:
        return max(0.0, self._paused_until - CLOCK.monotonic())

    def ended(self) -> None:
        if self._reserve.fill():
            self._paused_until = 0.0
        inbox = self._inbox  # which a drain may close in another thread
        if self._progress.waited_for and inbox is not None:
            try:
                wire.try_send(inbox, (ENDED,))
            except OSError:
                pass

    def close(self) -> None:
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
            self._reserve.close()
