"""Applications that tests serve. A worker imports no more than it needs to serve them, as each worker does so anew."""

from __future__ import annotations

import os
import time
import warnings
from typing import TYPE_CHECKING, Any

from fdpool.fds import is_readable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fdpool.server import ServerWorker


def echo_pid(connection: socket.socket, _address: object) -> None:
    """Answer one line with this worker's pid, and the line."""
    data = connection.recv(1000)
    if data:
        connection.sendall(b"%d %s" % (os.getpid(), data))


def note_and_echo(noted: Path, connection: socket.socket, address: tuple[str, int]) -> None:
    """Note the client's port, as the request begins; take a while; and echo one line."""
    with noted.open("a") as file:
        file.write(f"{address[1]}\n")
    time.sleep(0.01)
    connection.sendall(connection.recv(1000))


def keep_echoing(connection: socket.socket, _address: object) -> None:
    """Echo until the client has enough."""
    while data := connection.recv(65536):
        connection.sendall(data)


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers with its worker's pid; `/sleep/0.5` takes its time, `/stream/5` goes on."""
    import asyncio

    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    _, verb, *rest = [*scope["path"].split("/"), ""]
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"{os.getpid()} {message['text']}"})
        return
    if verb == "sleep":
        await asyncio.sleep(float(rest[0]))
    elif verb == "block":
        time.sleep(float(rest[0]))  # noqa: ASYNC251 - the point of it
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for _ in range(int(rest[0]) if verb == "stream" else 0):
        await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
        await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": body})


async def asgi_in_asyncio(scope: Any, receive: Any, send: Any) -> None:
    """The same, for tests that serve it in asyncio's own loop."""
    await asgi(scope, receive, send)


def asgi_answering(body_of: Callable[[Any], bytes]) -> Any:
    """An ASGI application that answers with `body_of(scope)`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await asgi(scope, receive, send)
            return
        body = body_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def hold_loop(folder: Path, scope: Any) -> bytes:
    """For `asgi_answering`: note the request in the folder's `begun`, and let nothing else happen in the worker for as
    long as the file is there that the path names; for 20 ms where that is `compute` or `wait`."""
    name = scope["path"][1:]
    until = time.perf_counter() + 0.02
    while name == "compute" and time.perf_counter() < until:
        pass
    if name == "wait":
        time.sleep(0.02)
    with (folder / "begun").open("a") as begun:
        begun.write(f"{name}\n")
    while (folder / name).exists():
        time.sleep(0.002)
    return b"held"


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """A WSGI application that answers with its worker's pid; `/sleep/0.5` takes its time."""
    _, verb, *rest = [*environ["PATH_INFO"].split("/"), ""]
    if verb == "sleep":
        time.sleep(float(rest[0]))
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def close_idle_after(seconds: float, _: ServerWorker) -> None:
    """A hook: of a WSGI worker that drains."""
    from fdpool._server import wsgi as face

    face._IDLE_S = seconds


def boot_for_long_at_first(worker: ServerWorker) -> None:
    """A hook: those of the first reload do not come to serve, so that whatever comes meanwhile does not come late."""
    if worker.generation == 2:
        worker.wait_drain()


def sleep_and_tell(connection: socket.socket, _: object) -> None:
    """Take as many seconds as the client says, and answer."""
    time.sleep(float(connection.recv(100)))
    connection.sendall(b"done")


def slow_or_pid(connection: socket.socket, _: object) -> None:
    """Answer with this worker's pid; "slow" is never answered."""
    if connection.recv(100) == b"slow":
        time.sleep(600)
    connection.sendall(b"%d " % os.getpid())


def wsgi_slow_or_pid(environ: Any, start_response: Any) -> list[bytes]:
    if environ["PATH_INFO"] == "/slow":
        time.sleep(600)
    return wsgi(environ, start_response)


def slow_then_pid(connection: socket.socket, _: object) -> None:
    time.sleep(float(connection.recv(100)))
    connection.sendall(b"%d" % os.getpid())


def pid_and_stay(connection: socket.socket, _: object) -> None:
    """Answer with this worker's pid, and serve until the client goes."""
    connection.sendall(b"%d" % os.getpid())
    connection.recv(1)


def fork_and_fail() -> bytes:
    """How a child has ended that was to become another program, and could not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
        pid = os.fork()
    if pid == 0:
        os.execv("/nowhere", ["nowhere"])
    return b"0 %d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forks(connection: socket.socket, _: object) -> None:
    connection.sendall(fork_and_fail())


async def asgi_forks(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await asgi(scope, receive, send)
        return
    body = fork_and_fail()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def asgi_forks_and_says_so(scope: Any, receive: Any, send: Any) -> None:
    """As frameworks do, it answers for what has failed."""
    try:
        await asgi_forks(scope, receive, send)
    except OSError:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"the child"})
        raise


def wsgi_forks(environ: Any, start_response: Any) -> list[bytes]:
    body = fork_and_fail()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


class Gate:
    """A place where the application waits for the test, which waits for it there: a FIFO."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        os.mkfifo(path)

    def wait(self) -> None:
        """Runs in: the application.

        In short turns: a signal that comes just before a call that waits is heard by Python when that returns.
        """
        fifo = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while not is_readable(fifo, 0.02):
                pass
            os.set_blocking(fifo, True)
            # Until the test has closed it, or it would be found open by the next to wait.
            while os.read(fifo, 10):
                pass
        finally:
            os.close(fifo)

    def let_pass(self) -> None:
        """Return when the application has come."""
        with open(self._path, "wb") as fifo:
            fifo.write(b"x")


def with_write(start_response: Any, pieces: Iterator[bytes]) -> list[bytes]:
    write = start_response("200 OK", [])
    for piece in pieces:
        write(piece)
    return []


def with_length(start_response: Any, pieces: Iterator[bytes]) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Length", "3")])
    return pieces


def without_length(start_response: Any, pieces: Iterator[bytes]) -> Iterator[bytes]:
    start_response("200 OK", [])
    return pieces


def have_log_raise(_worker: ServerWorker) -> None:
    """A hook: whatever a worker logs meets a handler that raises."""
    import logging

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise BrokenPipeError(f"nobody reads {record.getMessage()!r}")

    logging.getLogger("fdpool").addHandler(Raising())


def fail_or_pid(connection: socket.socket, _address: object) -> None:
    """Fail, if that is asked for."""
    if connection.recv(100) == b"fail":
        raise ValueError("as it was asked to")
    connection.sendall(b"%d" % os.getpid())
