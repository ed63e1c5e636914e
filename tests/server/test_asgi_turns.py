"""What an ASGI worker does in which turn of its event loop: taking, counting and draining connections (S1).

In the process of the test, as only there the order within a turn can be chosen.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.process_state import wait_until

pytest.importorskip("uvicorn")

from fdpool import wire
from fdpool._server.asgi import AsgiFace
from fdpool._server.context import Order, ServerWorker
from fdpool._server.doors import HANDED, Door, HandedOver, Listening
from fdpool._server.progress import Progress, SeenPage

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


def serve(
    listener: socket.socket,
    on_ready: Callable[[AsgiFace, SeenPage], None],
    inbox: socket.socket | None = None,
    request_timeout_s: float | None = None,
) -> None:
    """Serve `hello` until drained; `on_ready` runs in the loop. (uvloop accepts by itself, in one turn.)

    Args:
        listener: accepted from, if there is no inbox; owned.
        inbox: where connections are handed over; owned.
    """
    order = Order(0, 1, None, b"", False, "asgi", None, None, request_timeout_s, 128, {"loop": "asyncio"})
    page = SeenPage()
    worker = ServerWorker(0, 1, Progress(page.fd), lambda message: None)
    door: Door = Listening([listener]) if inbox is None else HandedOver(inbox.detach(), worker.progress)
    face = AsgiFace(hello, order, worker, door, [listener])
    try:
        face.serve(lambda: on_ready(face, page))
    finally:
        door.close()
        listener.close()
        worker.close()
        worker.progress.close()
        page.close()


def test_connections_accepted_in_the_turn_of_a_drain_are_served() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    clients: list[socket.socket] = []

    def connect(face: AsgiFace, _page: SeenPage) -> None:
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


def test_connections_that_have_ended_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By these counts the server hands over the next ones: ten times a second is not enough."""

    async def never(_face: object, _counter: int) -> bool:
        await ended.wait()
        return True

    def go_on(face: AsgiFace, page: SeenPage) -> None:
        loop = asyncio.get_running_loop()
        scenario.append(threads.submit(client, page))
        scenario[0].add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))

    def client(page: SeenPage) -> None:
        for number in (1, 2, 3):
            connect_and_leave(page, number)

    def connect_and_leave(page: SeenPage, number: int) -> None:
        with socket.create_connection(listener.getsockname()) as connection:
            accepted, _ = listener.accept()
            with accepted:
                assert wire.try_send(mine, (HANDED,), (accepted.fileno(),))
            wait_until(lambda: page.load() == (number, 1))
            connection.sendall(REQUEST)
            assert connection.recv(8) == b"HTTP/1.1"
            assert page.load() == (number, 1)
        wait_until(lambda: page.load() == (number, 0))

    monkeypatch.setattr("fdpool._server.asgi._Server.on_tick", never)
    ended = asyncio.Event()
    scenario: list[Future[None]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with mine, ThreadPoolExecutor(1) as threads:
        serve(listener, go_on, theirs)
    scenario[0].result()


def test_the_loop_is_seen_to_turn_whatever_uvicorn_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ticks ten times a second, and not as it ends."""

    async def never(_face: object, _counter: int) -> bool:
        await ended.wait()
        return True

    def go_on(face: AsgiFace, page: SeenPage) -> None:
        loop = asyncio.get_running_loop()
        next_beat = face._server._next_beat
        assert next_beat is not None
        assert next_beat.when() <= loop.time() + request_timeout_s / 4
        scenario.append(threads.submit(watch, page))
        scenario[0].add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))

    def watch(page: SeenPage) -> None:
        for _ in range(3):
            before = page.see().beat
            assert before is not None
            wait_until(lambda before=before: page.see().beat != before)  # type: ignore[misc]

    monkeypatch.setattr("fdpool._server.asgi._Server.on_tick", never)
    request_timeout_s = 0.08
    ended = asyncio.Event()
    scenario: list[Future[None]] = []
    with ThreadPoolExecutor(1) as threads:
        serve(socket.create_server(("127.0.0.1", 0)), go_on, request_timeout_s=request_timeout_s)
    scenario[0].result()
