"""S1: a drain that comes in the very turn of the event loop in which connections are accepted.

In the process of the test, as only there the order within a turn can be chosen.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from fdpool._server.asgi import AsgiFace
from fdpool._server.context import Order, ServerWorker
from fdpool._server.doors import Listening
from fdpool._server.progress import Progress, SeenPage

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


def serve(listener: socket.socket, on_ready: Callable[[AsgiFace], None]) -> None:
    """Serve `hello` until drained; `on_ready` runs in the loop. (uvloop accepts in one turn.)"""
    order = Order(0, 1, None, b"", False, "asgi", None, None, None, 128, {"loop": "asyncio"})
    page = SeenPage()
    worker = ServerWorker(0, 1, Progress(page.fd), lambda message: None)
    door = Listening([listener])
    face = AsgiFace(hello, order, worker, door, [listener])
    try:
        face.serve(lambda: on_ready(face))
    finally:
        door.close()
        worker.close()
        worker.progress.close()
        page.close()


def test_connections_accepted_in_the_turn_of_a_drain_are_served() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    clients: list[socket.socket] = []

    def connect(face: AsgiFace) -> None:
        def drain() -> None:
            # The loop has found the listener readable, and will accept after this, and drain after that.
            face.drain(30.0, False)

        for _ in range(5):
            client = socket.create_connection(listener.getsockname())
            client.sendall(REQUEST)
            clients.append(client)
        asyncio.get_running_loop().call_soon(drain)

    serve(listener, connect)
    answers = []
    for client in clients:
        with client, client.makefile("rb") as stream:
            answers.append(stream.read())
    assert [answer[-5:] for answer in answers] == [b"hello"] * 5
    assert all(b"connection: close" in answer.lower() for answer in answers)
