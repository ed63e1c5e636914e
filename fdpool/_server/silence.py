"""Connections whose clients have yet to say something: the server keeps them until they do, or are too many.

What a worker has taken nobody else can serve. So a connection on which there is nothing to read yet is not handed over:
what its client sends while that worker computes something would be lost with it, unread. Only of HTTP: there it is the
client who speaks first.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..fds import is_readable
from . import room

if TYPE_CHECKING:
    from .turns import Turns

_MOST = 256
# Of this process: to start a worker takes a dozen for a moment, and that may be the only one.
_KEPT_FREE = 24


def has_room() -> bool:
    """True if a connection may be kept here, and a worker could be started nevertheless."""
    return room.unseen(_KEPT_FREE) >= 0


class Silent:
    """Keeps connections, the longest silent first. Runs in: the server's thread, all of it.

    Args:
        spoke: called with a connection, which is the callee's to close, as there is something to read on it (or its
            end), or as it is given up because so many others are silent.
    """

    def __init__(self, turns: Turns, spoke: Callable[[socket.socket], object]) -> None:
        self._turns = turns
        self._spoke = spoke
        self._connections: dict[socket.socket, None] = {}

    def keep(self, connection: socket.socket) -> bool:
        """Keep it, if it is silent; False if it stays the caller's."""
        if is_readable(connection) or not has_room():
            return False
        try:
            self._turns.watch(connection, partial(self._let_go, connection))
        except OSError:
            return False  # the kernel has no room to watch one more: it need not be us who waits
        self._connections[connection] = None
        if len(self._connections) > _MOST:
            self._let_go(next(iter(self._connections)))
        return True

    def release(self) -> list[socket.socket]:
        """All of them, the caller's to close."""
        released = list(self._connections)
        for connection in released:
            self._forget(connection)
        return released

    def close(self) -> None:
        """Close all; not watched any more, or that is over with the turns."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _let_go(self, connection: socket.socket) -> None:
        self._forget(connection)
        self._spoke(connection)

    def _forget(self, connection: socket.socket) -> None:
        del self._connections[connection]
        self._turns.unwatch(connection)
