"""Connections that the event loop accepts for itself, and not by the worker's door: with uvloop, as long as there are
descriptors, and as others have as many.

There requests that come one by one, each on a connection of its own, take 1.4 times the CPU by way of the door.

asyncio's own loop accepts as we do; but it makes a listener non-blocking that was given (hazard M17), where no
descriptor is left it tries and logs `backlog` times in a turn, and as it stops it loses what it has just accepted
(https://github.com/python/cpython/issues/109564). libuv before 1.45 accepts in a turn as long as clients come,
and that may be more than there are descriptors for (https://github.com/libuv/libuv/pull/3696).

Runs in: the loop's thread, all of it.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import _own_sockets
from ..fds import duplicate
from . import room
from .courtesy import Courtesy
from .intake import Connections

# libuv accepts at most one connection of a listener each time that it polls, and polls up to 48 times in a turn; and
# the application is to have some, too.
_KEPT_FREE = 64
_KEPT_FREE_PER_LISTENER = 64


def accepts_well(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether it is one that is to accept by itself."""
    if isinstance(loop, asyncio.SelectorEventLoop):
        return False
    version_of_libuv = getattr(sys.modules.get("uvloop.loop"), "libuv_get_version", lambda: 0x012D00)
    return bool(version_of_libuv() >= 0x012D00)


class ByLoop:
    """The loop's servers, on copies of the listeners.

    Args:
        filenos: of the listeners; borrowed.
        backlog: as it listens, it says anew how long their queues are.
        connections: uvicorn's; has this looked after as they come.
        no_room: called as nothing more is taken in this way, for want of descriptors.

    Attributes:
        courtesy: towards other workers, if there may be any.
    """

    courtesy: Courtesy | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        filenos: Sequence[int],
        backlog: int,
        make_protocol: Callable[[], Any],
        connections: Connections,
        no_room: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._filenos = list(filenos)
        self._backlog = backlog
        self._make_protocol = make_protocol
        self._connections = connections
        self._no_room = no_room
        self._margin = _KEPT_FREE + _KEPT_FREE_PER_LISTENER * len(self._filenos)  # of descriptors
        self._servers: list[asyncio.AbstractServer] = []
        self._opening: asyncio.Task[None] | None = None
        self._closed = False
        self._wanted = True  # that the loop accepts
        self._room: float = 0  # so many more may come before it is looked at how many descriptors are left
        self._granted: float = 0  # so many more before anything is

    def has_room(self) -> bool:
        """Whether there are enough descriptors now."""
        return room.unseen(self._margin) >= 0

    async def open(self) -> None:
        """Have the loop accept.

        Raises:
            OSError: no descriptor is left. It is to be closed then, as after anything else that is raised.
        """
        for fileno in self._filenos:
            # The door keeps its own. (A socket's `dup` would set O_NONBLOCK anew, which all workers share.)
            own = _own_sockets.adopt(duplicate(fileno))
            try:
                server = await self._loop.create_server(self._make_protocol, sock=own, backlog=self._backlog)
            except BaseException:
                own.close()
                raise
            self._servers.append(server)
        if self._closed:
            return  # meanwhile: others look after the connections
        self._connections.tell(None)
        self._connections.look = self._look
        self.look_soon()

    def look_soon(self) -> None:
        """Have it looked at the next connection how many more may come: others have had time to open something."""
        self._room = self._granted = self._connections.unseen = 0

    def stop(self) -> None:
        """Have the loop accept no more. What it has accepted is uvicorn's, which hears of it in its own time."""
        self._wanted = False
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self.courtesy is not None and not self._closed:
            self._connections.tell(self.courtesy.one_has_gone)

    def go_on(self) -> None:
        """Have it accept again."""
        self._wanted = True
        if self._opening is None and not self._closed:
            self._opening = self._loop.create_task(self._open_again())

    async def _open_again(self) -> None:
        try:
            await self.open()
        except Exception as error:
            self._give_up()  # whatever it was: who accepts no more is to accept in the other way
            if not isinstance(error, OSError):
                raise
        finally:
            self._opening = None
            if self._closed or not self._wanted:  # by one that it had accepted before, say, and tells of now
                self.stop()

    def close(self) -> None:
        """Accept no more, ever; safe to call again."""
        self._closed = True
        self.stop()
        self._connections.tell(None)
        self._connections.unseen = math.inf
        if self.courtesy is not None:
            self.courtesy.close()

    def _give_up(self) -> None:
        if not self._closed:
            self.close()
            self._no_room()

    def _look(self) -> float:
        """How many more may come before the next look."""
        if self._closed:
            return math.inf
        self._room -= self._granted + 1
        if self._room < 0:
            self._room = room.unseen(self._margin)
            if self._room < 0:
                self._give_up()
                return math.inf
        self._granted = self._room
        if self.courtesy is not None:
            # It is called again as the last of those comes.
            self._granted = min(self._room, max(0, self.courtesy.spare() - 1))
        return self._granted
