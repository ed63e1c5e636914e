"""WebSockets over ASGI: served, and told to come again when their worker drains (S7)."""

from __future__ import annotations

import asyncio

import pytest

from fdpool.server import Server
from tests.process_state import wait_until
from tests.server.applications import asgi
from tests.server.helpers import ANY_PORT, WAYS_INTO_ASGI, pids, port_of

pytest.importorskip("uvicorn")
websockets = pytest.importorskip("websockets.asyncio.client")


@pytest.mark.parametrize(("loop", "dispatch"), WAYS_INTO_ASGI)
def test_a_websocket_is_served_and_closed_with_service_restart_when_its_worker_drains(
    loop: str, dispatch: str
) -> None:
    async def talk(port: int, server: Server) -> tuple[list[str], int | None]:
        said = []
        async with websockets.connect(f"ws://127.0.0.1:{port}/") as client:
            for word in ("one", "two"):
                await client.send(word)
                said.append(str(await client.recv()).partition(" ")[2])
            reload = asyncio.wrap_future(server.reload())
            await client.wait_closed()
            await reload
            code: int | None = client.close_code
        async with websockets.connect(f"ws://127.0.0.1:{port}/") as client:
            await client.send("three")
            pid, _, word = str(await client.recv()).partition(" ")
            said.append(word)
            assert int(pid) in pids(server)
        return said, code

    with Server(asgi, ANY_PORT, workers=1, dispatch=dispatch, options={"loop": loop}) as server:  # type: ignore[arg-type]
        assert asyncio.run(talk(port_of(server), server)) == (["one", "two", "three"], 1012)
        wait_until(lambda: len(server.stats().workers) == 1)
