"""uvicorn, for the length of one test: it ends as soon as it is told.

Runs in: a worker.
"""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

# Of the event loop, in which it learns of clients that have just gone: it hears of it in one, and acts in the next.
_TURNS = 3


class Server(uvicorn.Server):  # type: ignore[misc, unused-ignore]  # it may not be installed
    """uvicorn's server without its two rests. It looks every tenth of a second whether it is to end, and then waits
    another one: a fifth of a second in each test, where all the rest takes a hundredth."""

    _told: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, app: Any) -> Server:
        """A server of the application, with its lifespan if it has such."""
        return cls(uvicorn.Config(app, lifespan="auto"))

    def run_on(self, listening: socket.socket) -> None:
        """Serve until SIGTERM.

        Raises:
            RuntimeError: the application failed at its start.
        """
        self.run(sockets=[listening])
        if not self.started:
            raise RuntimeError("the application failed at its start (lifespan)")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None and self._told is not None:
            self._loop.call_soon_threadsafe(self._told.set)

    async def main_loop(self) -> None:
        self._told, self._loop = asyncio.Event(), asyncio.get_running_loop()
        tick = 0
        while not await self.on_tick(tick):
            tick += 1
            try:
                await asyncio.wait_for(self._told.wait(), 0.1)
            except asyncio.TimeoutError:
                pass

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets=sockets)
            return
        for server in self.servers:
            server.close()
        if not self.force_exit:
            await self.lifespan.shutdown()
