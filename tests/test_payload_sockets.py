"""Sockets and connections of every kind arrive usable, and nothing about the sender's own is changed.

Rows: H5, H6, H7, M30, P17, P19.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe

import pytest

from fdpool import errors, payload
from fdpool.fds import Fd

from .payload_helpers import in_another_process, roundtrip


@contextmanager
def tcp_pair(family: int = socket.AF_INET) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection on the loopback."""
    with socket.create_server(("localhost", 0), family=family) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as client:
            server, _ = listener.accept()
            with server:
                yield client, server


def nonblocking(sock: socket.socket) -> bool:
    return bool(fcntl.fcntl(sock.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK)


# -- kinds (H5) ------------------------------------------------------------------------------------------


def _v6_dual() -> socket.socket:
    return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)


UNCONNECTED: dict[str, Callable[[], socket.socket]] = {
    "tcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "tcp6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "unix dgram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unix seqpacket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "listening": lambda: socket.create_server(("localhost", 0)),
    "dual stack": _v6_dual,
}


@pytest.mark.parametrize("kind", UNCONNECTED)
def test_a_socket_arrives_with_its_family_type_and_address(kind: str) -> None:
    """H5."""
    with UNCONNECTED[kind]() as sock, roundtrip(sock) as copy:
        assert type(copy) is socket.socket
        assert (copy.family, copy.type, copy.proto) == (sock.family, sock.type, sock.proto)
        assert copy.getsockname() == sock.getsockname()
        assert os.path.samestat(os.fstat(copy.fileno()), os.fstat(sock.fileno()))
        assert not copy.get_inheritable()


@pytest.mark.parametrize("kind", ["listening", "dual stack"])
def test_a_listener_is_served_by_another_process(kind: str) -> None:
    """H5."""
    with UNCONNECTED[kind]() as listener:
        family = listener.family
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", listener.getsockname()[1]))
            in_another_process(_greet_next, listener)
            assert client.recv(100) == b"welcome"
            assert client.recv(100) == b"", "the worker's close is the end: nobody else holds the connection"


def _greet_next(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.sendall(b"welcome")


def test_a_connection_moves_to_another_process_with_data_unread() -> None:
    """H5."""
    with tcp_pair() as (client, server):
        client.sendall(b"early ")
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        assert in_another_process(_read_all, server) == b"early late"
        client_got = server.fileno()
        assert client_got > 0, "the sender's own stays open"


def _read_all(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as f:
        return f.read()


def test_a_half_closed_connection_stays_half_closed() -> None:
    """H5."""
    with tcp_pair() as (client, server):
        server.shutdown(socket.SHUT_WR)
        with roundtrip(server) as copy:
            with pytest.raises(BrokenPipeError):
                copy.send(b"x")
            client.sendall(b"still open this way")
            assert copy.recv(100) == b"still open this way"


def test_a_reset_connection_arrives_with_its_error() -> None:
    """H5."""
    with tcp_pair() as (client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with roundtrip(server) as copy, pytest.raises(ConnectionResetError):
            copy.recv(1)


def test_the_peer_sees_the_end_only_when_both_copies_are_closed() -> None:
    """H5, M28."""
    a, b = socket.socketpair()
    with a:
        copy = roundtrip(b)
        b.close()
        a.setblocking(False)
        with pytest.raises(BlockingIOError):
            a.recv(1)
        copy.close()
        assert a.recv(1) == b""


def test_datagrams_go_through_the_copy() -> None:
    """H5."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with roundtrip(sock) as copy:
            sock.sendto(b"x", copy.getsockname())
            assert copy.recvfrom(10) == (b"x", sock.getsockname())


# -- timeouts (H6, M30) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 0.0, 5.0])
def test_the_timeout_arrives_and_the_blocking_mode_is_untouched(timeout: float | None) -> None:
    """H6, M30, P17."""
    a, b = socket.socketpair()
    with a, b:
        b.settimeout(timeout)
        before = nonblocking(b)
        with roundtrip(b) as copy:
            assert copy.gettimeout() == b.gettimeout() == timeout
            assert nonblocking(b) is before is (timeout is not None)
            if timeout != 0.0:
                a.send(b"x")
                assert copy.recv(1) == b"x"
        assert nonblocking(b) is before


def test_a_worker_waits_on_a_socket_with_a_timeout() -> None:
    """H6: as the description is non-blocking, a socket without that timeout would raise BlockingIOError."""
    a, b = socket.socketpair()
    with a, b:
        b.settimeout(20)
        assert in_another_process(_send_then_wait, a, b) == b"x"


def _send_then_wait(a: socket.socket, b: socket.socket) -> bytes:
    import threading

    thread = threading.Thread(target=lambda: a.send(b"x"))
    thread.start()
    try:
        return b.recv(1)
    finally:
        thread.join()


def test_a_socket_that_somebody_made_nonblocking_says_so() -> None:
    """M30: its sender has no timeout, and every call of the sender's raises BlockingIOError."""
    a, b = socket.socketpair()
    with a, b:
        os.set_blocking(b.fileno(), False)
        assert b.gettimeout() is None
        with roundtrip(b) as copy:
            assert copy.gettimeout() == 0.0
        assert nonblocking(b)


def test_a_sender_that_changed_its_mind_keeps_its_blocking_mode() -> None:
    """P17."""
    a, b = socket.socketpair()
    with a, b:
        b.settimeout(5)
        sent = payload.dumps(b)
        b.settimeout(None)
        assert sent.fds is not None
        with payload.loads(sent.body, sent.fds.detach(), sent.spilled) as copy:
            assert copy.gettimeout() is None
            assert not nonblocking(b)


def test_a_default_timeout_over_there_does_not_make_the_sender_nonblocking() -> None:
    """P17: socket.socket(fileno=...) would set O_NONBLOCK on the shared description."""
    a, b = socket.socketpair()
    with a, b:
        sent = payload.dumps(b)
        assert sent.fds is not None
        socket.setdefaulttimeout(7)
        try:
            with payload.loads(sent.body, sent.fds.detach(), sent.spilled) as copy:
                assert copy.gettimeout() is None
                assert not nonblocking(b)
                assert os.path.samestat(os.fstat(copy.fileno()), os.fstat(b.fileno()))
        finally:
            socket.setdefaulttimeout(None)


# -- refused (H7, P19) ------------------------------------------------------------------------------------


def test_a_closed_socket_is_refused() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(errors.DescriptorRefused, match=r"argument 1 of print\(...\): <socket.*it is closed"):
        payload.dumps_call(print, (sock,), {})


def test_a_tls_socket_is_refused() -> None:
    """H7."""
    a, b = socket.socketpair()
    with (
        b,
        ssl.create_default_context().wrap_socket(
            a, server_hostname="x", do_handshake_on_connect=False
        ) as tls,
    ):
        for obj in (tls, [tls], lambda: tls):
            with pytest.raises(errors.DescriptorRefused, match="TLS state cannot travel"):
                payload.dumps(obj)


def test_the_file_of_a_tls_socket_is_refused() -> None:
    """H7."""
    a, b = socket.socketpair()
    with (
        b,
        ssl.create_default_context().wrap_socket(
            a, server_hostname="x", do_handshake_on_connect=False
        ) as tls,
    ):
        with (
            tls.makefile("rb") as f,
            pytest.raises(errors.DescriptorRefused, match="TLS state cannot travel"),
        ):
            payload.dumps(f)


def test_asyncio_streams_and_transports_are_refused() -> None:
    """H7."""

    async def main() -> None:
        a, b = socket.socketpair()
        with b:
            reader, writer = await asyncio.open_connection(sock=a)
            loop = asyncio.get_running_loop()
            kept = writer.get_extra_info("socket")
            for obj in (reader, writer, writer.transport, kept, loop):
                with pytest.raises(
                    errors.DescriptorRefused, match="belongs to an event loop of this process"
                ):
                    payload.dumps(obj)
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


def test_the_pools_own_sockets_are_refused() -> None:
    a, b = socket.socketpair()
    with a, b:
        payload.reserve(a.fileno())
        try:
            with pytest.raises(errors.DescriptorRefused, match="belongs to the pool itself"):
                payload.dumps({"deep": a})
        finally:
            payload.release(a.fileno())


# -- makefile (P19) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "rb", "w", "wb"])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_sockets_file_arrives(mode: str, buffering: int) -> None:
    a, b = socket.socketpair()
    with a, b, b.makefile(mode, buffering=buffering if "b" in mode else None) as f:
        copy = roundtrip(f)
        assert type(copy) is type(f)
        if "r" in mode:
            a.sendall(b"line\n")
            assert copy.readline() in ("line\n", b"line\n")
        else:
            copy.write("line\n" if mode == "w" else b"line\n")
            copy.flush()
            assert a.recv(100) == b"line\n"
        copy.close()


def test_closing_a_sockets_file_closes_its_socket_there() -> None:
    a, b = socket.socketpair()
    with a:
        with b, b.makefile("rb") as f:
            copy = roundtrip(f)
        a.setblocking(False)
        with pytest.raises(BlockingIOError):
            a.recv(1)
        copy.close()
        assert a.recv(1) == b""


def test_a_socket_and_its_file_both_arrive() -> None:
    a, b = socket.socketpair()
    with a, b, b.makefile("rb") as f:
        sock, file = roundtrip((b, f))
        file.close()
        a.send(b"x")
        assert sock.recv(1) == b"x"
        sock.close()


def test_a_sockets_file_with_bytes_read_ahead_is_refused() -> None:
    """H7, P19."""
    a, b = socket.socketpair()
    with a, b, b.makefile("rb") as f:
        a.sendall(b"one\ntwo\n")
        assert f.readline() == b"one\n"
        with pytest.raises(
            errors.DescriptorRefused, match="bytes already read into its buffer would be lost"
        ):
            payload.dumps(f)
        assert f.readline() == b"two\n"
        roundtrip(f).close()


def test_a_sockets_two_way_file_is_refused() -> None:
    a, b = socket.socketpair()
    with a, b, b.makefile("rwb") as f, pytest.raises(errors.DescriptorRefused, match="two ends"):
        payload.dumps(f)


# -- subclasses -------------------------------------------------------------------------------------------


class Named(socket.socket):
    """A subclass that is made like its base."""

    label = "none"


class Configured(socket.socket):
    """A subclass with a constructor of its own."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label


def test_a_plain_subclass_arrives_as_itself_with_its_attributes() -> None:
    with Named() as sock:
        sock.label = "mine"
        with roundtrip(sock) as copy:
            assert type(copy) is Named
            assert copy.label == "mine"


def test_a_subclass_with_a_constructor_of_its_own_is_refused() -> None:
    with (
        Configured("x") as sock,
        pytest.raises(errors.DescriptorRefused, match="Configured is a socket with an"),
    ):
        payload.dumps(sock)


# -- multiprocessing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplex", [True, False])
def test_a_multiprocessing_connection_arrives(duplex: bool) -> None:
    """Plain pickle would carry its number, whatever file that is over there."""
    a, b = Pipe(duplex)
    with a, b:
        assert in_another_process(_tell, b) == "told"
        assert a.recv() == "hello"
        with roundtrip(a) as copy:
            assert type(copy) is Connection
            assert (copy.readable, copy.writable) == (a.readable, a.writable)
            assert copy.fileno() != a.fileno()


def _tell(connection: Connection) -> str:
    connection.send("hello")
    connection.close()
    return "told"


class Tagged(Connection):
    """A subclass, which plain pickle would send with its number."""


def test_a_subclass_of_a_connection_is_found() -> None:
    a, b = Pipe()
    with a, b:
        tagged = Tagged(os.dup(b.fileno()))
        tagged.tag = "mine"  # type: ignore[attr-defined]
        with tagged, roundtrip([tagged])[0] as copy:
            assert type(copy) is Tagged
            assert copy.tag == "mine"
            assert copy.fileno() not in (b.fileno(), tagged.fileno())
            a.send("x")
            assert copy.recv() == "x"


def test_a_closed_connection_is_refused() -> None:
    a, b = Pipe()
    a.close()
    b.close()
    with pytest.raises(errors.DescriptorRefused, match="it is closed"):
        payload.dumps(a)


def test_a_connection_that_claims_too_much_is_refused() -> None:
    """H9."""
    r, w = os.pipe()
    os.close(w)
    with Connection(r) as connection, pytest.raises(errors.DescriptorRefused, match="it is writable, but"):
        payload.dumps(connection)


def test_a_sockets_bare_number_travels_as_a_handle() -> None:
    a, b = socket.socketpair()
    with a, b, roundtrip(Fd(a)) as handle:
        with socket.socket(fileno=os.dup(handle.fileno())) as copy:
            b.send(b"x")
            assert copy.recv(1) == b"x"
