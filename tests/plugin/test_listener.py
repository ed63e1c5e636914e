"""Listeners: bound before anybody serves, handed over by descriptor, gone at the end."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

import fdpool
from fdpool._fixtures.listener import Kind, Listener, ListenerFactory

KINDS: list[Kind] = ["tcp", "tcp6", "unix"]


def _answer(listener: Listener) -> str:
    connection, _ = listener.socket.accept()
    with connection:
        connection.sendall(connection.recv(100).upper())
    return repr(listener)


@pytest.mark.parametrize("listener", KINDS, indirect=True)
def test_a_client_may_connect_and_speak_before_there_is_a_server(
    listener: Listener, worker_pool: fdpool.Pool
) -> None:
    with listener.connect() as client:
        client.sendall(b"early")
        served = worker_pool.submit(_answer, listener)
        assert client.recv(100) == b"EARLY"
    assert served.result().startswith(f"<Listener {listener.kind} ")


def test_a_worker_that_lets_go_of_a_listener_leaves_it_to_the_test(
    listener_factory: ListenerFactory, worker_pool: fdpool.Pool
) -> None:
    listener = listener_factory("unix")
    for _ in range(2):
        with listener.connect() as client:
            client.sendall(b"x")
            worker_pool.submit(_answer, listener).result()
    assert os.path.exists(listener.path)


def test_where_it_is_to_be_found(listener_factory: ListenerFactory) -> None:
    four, six, unix = (listener_factory(kind) for kind in KINDS)
    assert four.address == (four.host, four.port) == four.socket.getsockname()
    assert four.url == f"http://127.0.0.1:{four.port}"
    assert six.url == f"http://[::1]:{six.port}"
    assert unix.address == unix.path
    assert unix.url == f"http+unix://{unix.path.replace('/', '%2F')}"
    assert repr(four) == f"<Listener tcp 127.0.0.1:{four.port} on descriptor {four.fileno()}>"
    with pytest.raises(ValueError, match="a Unix socket has no port; its path is /"):
        unix.port
    with pytest.raises(ValueError, match="a TCP socket has no path; its address is "):
        four.path


def test_what_makes_no_sense_is_refused_and_leaves_nothing(listener_factory: ListenerFactory) -> None:
    with pytest.raises(ValueError, match="kind must be 'tcp', 'tcp6' or 'unix', not 'udp'"):
        listener_factory("udp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Unix socket has no host"):
        listener_factory("unix", host="localhost")
    with pytest.raises(OSError):
        listener_factory("tcp", host="192.0.2.1")  # of nobody (RFC 5737)


def test_closing_takes_the_path_along_and_is_safe_to_repeat() -> None:
    listener = Listener.open("unix")
    folder = Path(listener.path).parent
    with listener:
        assert listener.fileno() > 2
    listener.close()
    assert not folder.exists()
    assert "closed" in repr(listener)


def test_a_long_folder_for_temporary_files_is_passed_over_by_unix_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernel: the path of a Unix socket has room for 107 bytes (unix(7))."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Listener.open("unix") as listener:
        assert listener.path.startswith("/tmp/fdpool-")
        listener.connect().close()


@pytest.mark.parametrize("kind", KINDS)
def test_refusing_turns_away_who_waits_and_who_comes_until_it_is_revived(
    kind: Kind, listener_factory: ListenerFactory
) -> None:
    listener = listener_factory(kind)
    for _ in range(2):
        with listener.connect() as waiting:
            listener.refuse()
            with pytest.raises(ConnectionResetError):
                waiting.recv(1)
        with pytest.raises(ConnectionRefusedError):
            listener.connect()
        listener.revive()
        listener.connect().close()
    listener.refuse()
    listener.close()
    with pytest.raises(OSError):
        listener.revive()


def test_a_reserved_port_is_given_to_nobody_and_may_be_bound_by_who_asks_for_it() -> None:
    with Listener.reserve() as kept:
        others = [Listener.open() for _ in range(50)]
        assert kept.port not in {other.port for other in others}
        for other in others:
            other.close()
        with pytest.raises(ConnectionRefusedError):
            kept.connect()
        with socket.create_server((kept.host, kept.port)):
            kept.connect().close()


def test_a_closed_listener_refuses_nothing_more() -> None:
    listener = Listener.open()
    listener.close()
    listener.refuse()
    with pytest.raises(OSError):
        socket.create_connection(listener.address)
