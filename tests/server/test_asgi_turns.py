"""What an ASGI worker does in which turn of its event loop: taking, counting and draining connections (S1).

In the process of the test, as only there the order within a turn can be chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.process_state import wait_until

pytest.importorskip("uvicorn")

from fdpool import wire
from fdpool._server import asgi, room
from fdpool._server.asgi import AsgiFace
from fdpool._server.balance import LEAD, Balance, Loads
from fdpool._server.context import Order, ServerWorker
from fdpool._server.doors import HANDED, Door, HandedOver, Listening
from fdpool._server.progress import Progress, SeenPage
from fdpool._server.steering import queued
from fdpool.fds import duplicate
from tests.server.helpers import Load, read_all

with contextlib.suppress(ImportError):
    import uvloop

    uvloop.new_event_loop().close()  # with its first loop, libuv opens a pipe that it keeps

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
    loop: str = "asyncio",
    loads: Loads | None = None,
) -> None:
    """Serve `hello` until drained; `on_ready` runs in the loop.

    Args:
        listener: accepted from, if there is no inbox; owned.
        inbox: where connections are handed over; owned.
        loads: this is the first of workers that have those.
    """
    pytest.importorskip(loop)
    # A client may keep its connection for longer than uvicorn's 5 seconds until it asks again, on a busy machine.
    options = {"loop": loop, "timeout_keep_alive": 60}
    order = Order(0, 1, None, b"", False, "asgi", None, None, request_timeout_s, 128, options)
    page = SeenPage()
    worker = ServerWorker(0, 1, Progress(page.fd), lambda message: None)
    balance = None if loads is None else Balance(loads.fd, 0)
    door: Door = (
        Listening([listener], balance) if inbox is None else HandedOver(inbox.detach(), worker.progress)
    )
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
        wait_until(lambda: queued(listener) == 5)  # a client may be connected a moment before
        face._server._intake._pace.at_once = 5
        face._server._intake._pace.turns = lambda now: None  # it would forget that, after so long a time
        asyncio.get_running_loop().call_soon(drain)

    serve(listener, connect)
    answers = []
    for client in clients:
        with client, client.makefile("rb") as stream:
            answers.append(stream.read())
    assert [answer[-5:] for answer in answers] == [b"hello"] * 5
    assert all(b"connection: close" in answer.lower() for answer in answers)


def answer(client: socket.socket) -> bytes:
    """What comes of one request on a connection that may stay open."""
    client.sendall(REQUEST)
    said = b""
    while not said.endswith(b"hello"):
        block = client.recv(1000)
        assert block, said
        said += block
    return said


def by_turns(ample: list[bool]) -> Callable[[int], int]:
    """In place of `room.unseen`, which is asked for each connection then: these answers, and the last one again and
    again."""
    answers: Iterator[bool] = itertools.chain(ample, itertools.repeat(ample[-1]))
    return lambda _: 0 if next(answers) else -1


@pytest.mark.parametrize(
    ("ample", "loop"),
    [
        pytest.param([True], "uvloop", id="by the loop"),
        pytest.param([True, False], "uvloop", id="by the loop and then the door"),
        pytest.param([False], "uvloop", id="by the door"),
        pytest.param([False], "asyncio", id="by the door in asyncio"),
    ],
)
def test_a_connection_accepted_as_a_drain_is_asked_for_is_served_however_it_was_accepted(
    ample: list[bool], loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces: list[AsgiFace] = []
    accepted = itertools.count(1)
    take, unseen = Listening.take, by_turns(ample)

    def count() -> None:
        if next(accepted) == 2:
            faces[0].drain(30.0, False)

    def counting_take(door: Listening, fileno: int) -> socket.socket | None:
        if (connection := take(door, fileno)) is not None:
            count()
        return connection

    def counting_unseen(margin: int) -> int:
        if faces:  # and not at the start
            count()
        return unseen(margin)

    def go_on(face: AsgiFace, _page: SeenPage) -> None:
        faces.append(face)
        scenario.append(threads.submit(client))

    def client() -> None:
        with socket.create_connection(address) as first:
            assert b"connection: close" not in answer(first).lower()
            with socket.create_connection(address) as second:
                for each in (second, first):
                    assert b"connection: close" in answer(each).lower()
                    assert each.recv(1) == b""

    monkeypatch.setattr(Listening, "take", counting_take)
    monkeypatch.setattr(room, "unseen", counting_unseen)
    scenario: list[Future[None]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with ThreadPoolExecutor(1) as threads:
        serve(listener, go_on, loop=loop)
    scenario[0].result()


def test_no_connection_is_lost_as_the_door_is_taken_in_the_midst_of_traffic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T3: uvloop, which would accept and close what there is no descriptor for."""
    by_door = itertools.count()
    take = Listening.take

    def counting_take(door: Listening, fileno: int) -> socket.socket | None:
        if (connection := take(door, fileno)) is not None:
            next(by_door)
        return connection

    def request() -> None:
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(client).endswith(b"hello")

    def go_on(face: AsgiFace, _page: SeenPage) -> None:
        assert face._server._by_loop is not None
        scenario.append(threads.submit(clients, face))

    def clients(face: AsgiFace) -> None:
        try:
            with socket.create_connection(address) as kept:
                answer(kept)
                assert next(by_door) == 0
                with Load(request, clients=8) as load:
                    load.go_on(400)
                    answer(kept)
            assert not load.failed
            assert next(by_door) > 100
        finally:
            face.drain(30.0, True)

    monkeypatch.setattr(Listening, "take", counting_take)
    monkeypatch.setattr(room, "unseen", by_turns([True] * 200 + [False]))
    scenario: list[Future[None]] = []
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with ThreadPoolExecutor(1) as threads:
        serve(listener, go_on, loop="uvloop")
    scenario[0].result()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_that_have_ended_are_counted_at_once(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By these counts the server hands over the next ones: ten times a second is not enough."""

    async def never(_face: object, _counter: int) -> bool:
        await ended.wait()
        return True

    def go_on(face: AsgiFace, page: SeenPage) -> None:
        running = asyncio.get_running_loop()
        scenario.append(threads.submit(client, page))
        scenario[0].add_done_callback(lambda _: running.call_soon_threadsafe(ended.set))

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
        serve(listener, go_on, theirs, loop=loop)
    scenario[0].result()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_server_that_cannot_say_that_it_serves_ends(loop: str) -> None:
    def fail(_face: AsgiFace, _page: SeenPage) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "nobody is there any more")

    with pytest.raises(ConnectionResetError):
        serve(socket.create_server(("127.0.0.1", 0)), fail, loop=loop)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_loop_is_seen_to_turn_whatever_uvicorn_is_about(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ticks ten times a second, and not as it ends."""

    async def never(_face: object, _counter: int) -> bool:
        await ended.wait()
        return True

    def go_on(face: AsgiFace, page: SeenPage) -> None:
        running = asyncio.get_running_loop()
        next_beat = face._server._next_beat
        assert next_beat is not None
        assert (
            next_beat.when() <= running.time() + request_timeout_s / 4 + 0.002
        )  # uvloop's are whole milliseconds
        scenario.append(threads.submit(watch, page))
        scenario[0].add_done_callback(lambda _: running.call_soon_threadsafe(ended.set))

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
        serve(socket.create_server(("127.0.0.1", 0)), go_on, request_timeout_s=request_timeout_s, loop=loop)
    scenario[0].result()


# -- beside others -----------------------------------------------------------------------------------------

MANY = 8 * LEAD


def connect_until_left_waiting(address: Any, kept: list[socket.socket], most: int) -> int:
    """Keep connections, one after the other, until one is not answered, the last of `kept`; how many are."""
    for answered in range(most):
        client = socket.create_connection(address)
        kept.append(client)
        client.settimeout(0.3)
        try:
            answer(client)
        except TimeoutError:
            client.settimeout(20.0)
            return answered
    return most


@pytest.fixture
def loads() -> Iterator[Loads]:
    made = Loads(8)
    yield made
    made.close()


@pytest.fixture
def other(loads: Loads) -> Balance:
    """Another worker, that accepts and has no connections."""
    balance = Balance(loads.fd, 1)
    balance.tell(0)
    return balance


def serve_to(
    clients: Callable[[AsgiFace], None], listener: socket.socket, loop: str, loads: Loads, told: list[Any]
) -> None:
    """Serve while `clients(face)` runs, beside the other workers that `loads` is of; `told` gets what the loop is told
    of errors that nobody has handled."""

    def run(face: AsgiFace) -> None:
        try:
            clients(face)
        finally:
            face.drain(30.0, True)

    def go_on(face: AsgiFace, _page: SeenPage) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        scenario.append(threads.submit(run, face))

    scenario: list[Future[None]] = []
    with ThreadPoolExecutor(1) as threads:
        serve(listener, go_on, loop=loop, loads=loads)
    scenario[0].result()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_worker_with_more_connections_than_another_lets_that_one_go_first(
    loop: str, loads: Loads, other: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1: until that has as many, or this one has fewer; and it drains meanwhile as ever."""
    monkeypatch.setattr("fdpool._server.courtesy._HEAD_START_S", 60.0)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    kept: list[socket.socket] = []
    told: list[Any] = []

    def connect(most: int) -> int:
        return connect_until_left_waiting(address, kept, most)

    def clients(_face: AsgiFace) -> None:
        assert LEAD <= connect(MANY) <= MANY / 2  # it does not look at each
        waiting = kept[-1]
        other.tell(MANY)
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200")
        assert connect(1) == 1
        other.tell(0)
        assert connect(MANY) < MANY
        waiting = kept.pop()
        while kept:  # with fewer it leads no more
            kept.pop().close()
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200")
        waiting.close()
        assert connect(MANY) < MANY

    with socket.socket(fileno=duplicate(listener.fileno())) as left:
        serve_to(clients, listener, loop, loads, told)
        assert queued(left) == 1  # for the other one
    for client in kept:
        client.close()
    assert told == []


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.usefixtures("other")
def test_what_another_worker_does_not_take_is_taken(loop: str, loads: Loads) -> None:
    """S1: it computes, say; and each time in a row that it is waited for, more are taken until the next time."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    told: list[Any] = []

    def clients(_face: AsgiFace) -> None:
        with contextlib.ExitStack() as kept:
            for _ in range(100):
                answer(kept.enter_context(socket.create_connection(address)))

    serve_to(clients, listener, loop, loads, told)
    assert told == []


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "none is left"), ValueError("a defect")])
def test_who_cannot_accept_again_after_it_stood_back_takes_the_door(
    error: Exception, loads: Loads, other: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3: and does not stay deaf."""
    monkeypatch.setattr("fdpool._server.courtesy._HEAD_START_S", 60.0)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    kept: list[socket.socket] = []
    told: list[Any] = []

    async def create_server(*_: Any, **__: Any) -> Any:
        raise error

    def clients(face: AsgiFace) -> None:
        assert connect_until_left_waiting(address, kept, MANY) < MANY
        by_loop: Any = face._server._by_loop
        loop = by_loop._loop
        by_loop._loop = SimpleNamespace(create_server=create_server, create_task=loop.create_task)
        other.tell(MANY)
        assert kept[-1].recv(1000).startswith(b"HTTP/1.1 200")
        assert face._server._by_loop is None
        assert connect_until_left_waiting(address, kept, 1) == 1

    serve_to(clients, listener, "uvloop", loads, told)
    for client in kept:
        client.close()
    gc.collect()
    assert told == [error] * isinstance(error, ValueError)


def test_who_is_to_stand_back_as_it_is_about_to_accept_again_does(loads: Loads) -> None:
    """Another connection, of those accepted before, may be told of in that very turn."""
    pytest.importorskip("uvloop")
    seen: list[int] = []

    def clients(face: AsgiFace) -> None:
        by_loop: Any = face._server._by_loop

        def go_on_and_stop() -> None:
            by_loop.stop()
            by_loop.go_on()
            by_loop.stop()

        async def look() -> None:
            go_on_and_stop()
            await by_loop._opening
            seen.append(len(by_loop._servers))
            by_loop.go_on()
            await by_loop._opening
            seen.append(len(by_loop._servers))

        asyncio.run_coroutine_threadsafe(look(), by_loop._loop).result(20)

    told: list[Any] = []
    serve_to(clients, socket.create_server(("127.0.0.1", 0)), "uvloop", loads, told)
    assert told == []
    assert seen == [0, 1]


@pytest.mark.parametrize("busy", [0, MANY], ids=["who leads", "who does not"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_no_connection_is_lost_as_requests_take_long_and_are_quick_in_turns(
    busy: int, loop: str, loads: Loads, other: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1: the door is taken, and left to the loop again, in every few beats."""
    by_loop: list[bool] = []
    weigh = asgi._Server._weigh_requests

    def weigh_and_note(server: asgi._Server, running: asyncio.AbstractEventLoop) -> None:
        weigh(server, running)
        by_loop.append(server._by_loop is not None)

    def request() -> None:
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(client).endswith(b"hello")

    def clients(_face: AsgiFace) -> None:
        with contextlib.ExitStack() as kept, Load(request, clients=8) as load:
            by_loop.clear()
            while len(by_loop) < 60 and not told:
                load.go_on(50)
                answer(kept.enter_context(socket.create_connection(address)))
        assert not load.failed

    other.tell(busy)
    long = itertools.cycle([True, True, False])
    monkeypatch.setattr("fdpool._server.asgi._BEAT_S", 0.01)
    monkeypatch.setattr("fdpool._server.pace.Weight.is_long", lambda *_: next(long))
    monkeypatch.setattr(asgi._Server, "_weigh_requests", weigh_and_note)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    told: list[Any] = []
    serve_to(clients, listener, loop, loads, told)
    assert told == []
    assert set(by_loop) == ({True, False} if loop == "uvloop" else {False})
