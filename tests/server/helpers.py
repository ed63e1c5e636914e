"""Servers and clients for tests: small, real, and explicit about what came of each request."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fdpool.server import Server, WorkerStats
from tests.process_state import wait_until

ANY_PORT = "127.0.0.1:0"

_NO_UVLOOP = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="there is no uvloop")

#: Loops of ASGI workers; uvicorn takes uvloop where it is installed.
LOOPS = ["asyncio", pytest.param("uvloop", marks=_NO_UVLOOP)]

#: Loops and dispatching: uvloop accepts by itself; what is handed over, and all with asyncio, comes by the same door.
WAYS_INTO_ASGI = [
    ("asyncio", "shared"),
    ("asyncio", "handoff"),
    pytest.param("uvloop", "shared", marks=_NO_UVLOOP),
    pytest.param("uvloop", "handoff", marks=_NO_UVLOOP),
]


def port_of(server: Server) -> int:
    """The port of the first listener."""
    port: int = server.sockets[0].getsockname()[1]
    return port


def connect(server: Server, timeout: float = 20.0) -> socket.socket:
    """A connection to the server's first listener."""
    listener = server.sockets[0]
    client = socket.socket(listener.family, socket.SOCK_STREAM)
    client.settimeout(timeout)
    client.connect(listener.getsockname())
    return client


def ask(server: Server, line: bytes = b"hello") -> tuple[int, bytes]:
    """The pid of the worker that answered one connection, and what it said."""
    with connect(server) as client:
        client.sendall(line)
        pid, _, said = read_all(client).partition(b" ")
        return int(pid), said


def read_all(client: socket.socket) -> bytes:
    data = b""
    while block := client.recv(65536):
        data += block
    return data


def is_over(client: socket.socket) -> bool:
    """True once the other side is gone, without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def reset(client: socket.socket) -> None:
    """Close a connection so that the other side gets RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def get(server: Server, path: str = "/", timeout: float = 20.0) -> tuple[int, bytes, str | None]:
    """Status, body and Connection header of one HTTP request on a connection of its own."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=timeout)
    ) as client:
        client.request("GET", path)
        response = client.getresponse()
        return response.status, response.read(), response.getheader("connection")


def pids(server: Server) -> list[int]:
    """Process ids of the workers that serve."""
    return [each.pid for each in workers(server) if each.pid is not None]


def workers(server: Server) -> list[WorkerStats]:
    """The workers that serve."""
    return [each for each in server.stats().workers if each.state == "serving"]


class Load:
    """Clients that send requests again and again, and count what becomes of each.

    Args:
        request: makes one request, or raises what went wrong with it.
    """

    def __init__(self, request: Callable[[], object], clients: int = 3) -> None:
        self.answered: Counter[object] = Counter()
        self.failed: list[str] = []
        self._request = request
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self._enough.is_set():
            try:
                self.answered[self._request()] += 1
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            self._enough.wait(0.002)  # a load, not a siege: servers and clients share the processors here

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    @property
    def count(self) -> int:
        """How many requests were answered."""
        return self.answered.total()

    def go_on(self, requests: int = 12) -> None:
        """Return when so many more were answered."""
        until = self.count + requests
        wait_until(lambda: self.count >= until or self.failed, 60)


class KeptAlive:
    """HTTP requests on one connection for each thread, for as long as the server keeps it open.

    As RFC 9112 has it (9.3.1), a client must expect the end of a connection that was idle; here it never may: an answer
    that ends the connection says so.
    """

    def __init__(self, server: Server, path: str = "/") -> None:
        self._address = ("127.0.0.1", port_of(server))
        self._path = path
        self._mine = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def __call__(self) -> bytes:
        client = getattr(self._mine, "client", None)
        if client is None:
            client = self._mine.client = http.client.HTTPConnection(*self._address, timeout=20)
            self._all.append(client)
        try:
            client.request("GET", self._path)
            response = client.getresponse()
            body: bytes = response.read()
        except BaseException:
            client.close()
            raise
        assert response.status == 200, response.status
        return body

    def close(self) -> None:
        for client in self._all:
            client.close()

    def __enter__(self) -> KeptAlive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def records(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[Any]]]:
    """What the server logs, by event."""
    with caplog.at_level(logging.DEBUG, logger="fdpool.server"):
        yield lambda event: [each for each in caplog.records if getattr(each, "event", None) == event]
