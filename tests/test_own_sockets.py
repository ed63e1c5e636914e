"""Sockets of ours do what they are told, whatever the program has done to the socket module (M30)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fdpool import Pool, _own_sockets
from fdpool._bind import open_listeners
from fdpool.server import Server
from tests.contract import helpers
from tests.server.helpers import ANY_PORT, connect, read_all


@pytest.fixture(params=[0.0, 0.05])
def default_timeout(request: pytest.FixtureRequest) -> Iterator[float]:
    socket.setdefaulttimeout(request.param)
    yield request.param
    socket.setdefaulttimeout(None)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_what_is_adopted_is_what_it_was(
    default_timeout: float, blocking: bool, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with socket.socket(family, kind) as sock:
        sock.setblocking(blocking)
        with _own_sockets.adopt(os.dup(sock.fileno())) as adopted:
            assert os.get_blocking(sock.fileno()) is blocking
            assert adopted.gettimeout() == (None if blocking else 0.0)
            assert (adopted.family, adopted.type) == (family, kind)


def test_what_is_no_socket_stays_its_owners(default_timeout: float) -> None:
    reading, writing = os.pipe()
    with open(reading), open(writing, "w"):
        with pytest.raises(OSError, match="not a socket|non-socket"):
            _own_sockets.adopt(reading)
        os.fstat(reading)


def test_what_is_new_blocks_without_a_timeout(default_timeout: float) -> None:
    first, second = _own_sockets.pair(socket.SOCK_DGRAM)
    with first, second, _own_sockets.made(socket.AF_INET6) as made:
        for sock in (first, second, made):
            assert sock.gettimeout() is None
            assert os.get_blocking(sock.fileno())


def test_a_listener_of_somebody_else_stays_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        socket.setdefaulttimeout(0.05)
        try:
            [listener] = open_listeners(given)
        finally:
            socket.setdefaulttimeout(None)
        with listener.socket:
            assert os.get_blocking(given.fileno())


@pytest.mark.parametrize("options", [{}, {"start_method": "fork"}])
def test_a_pool_of_a_program_with_a_default_timeout_works(
    default_timeout: float, options: dict[str, Any]
) -> None:
    with Pool(2, **options) as pool:
        assert list(pool.map(helpers.square, range(1000))) == [n * n for n in range(1000)]


def test_a_worker_whose_modules_set_a_default_timeout_waits_for_tasks() -> None:
    with Pool(1, preload=["tests.contract.helpers_timeout"]) as pool:
        pid = pool.submit(os.getpid).result()
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(pid).wait(0.05)
        assert pool.submit(os.getpid).result() == pid


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_a_connection_has_the_default_timeout_of_its_worker_not_of_the_server(
    default_timeout: float, dispatch: Any
) -> None:
    def tell(connection: socket.socket, _: object) -> None:
        connection.sendall(b"%d" % (connection.gettimeout() is None and os.get_blocking(connection.fileno())))

    with Server(tell, ANY_PORT, workers=1, dispatch=dispatch) as server, connect(server) as client:
        assert read_all(client) == b"1"


def test_a_pool_works_in_a_program_that_gevent_has_patched() -> None:
    pytest.importorskip("gevent")
    # Its own warnings are not ours.
    program = [sys.executable, "-W", "default", "-m", "tests.gevent_program"]
    done = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "said meanwhile",
        "500500",
        "timed out",
        "a program",
        "SIGINT blocked: False",
        "interrupted",
        "True",
    ], done.stderr
    assert done.returncode == 0, done.stderr
