"""Sockets, their `makefile()`, `multiprocessing` connections: how each is taken apart, and made again."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from ._checks import StandIn, attributes, check_access, check_subclass, open_number
from ._placement import Closable, hand_over, incoming, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

Reduced = tuple[Any, ...]

TLS_STAYS = "TLS state cannot travel; hand the plain socket over before the handshake"


def reduce_socket(sock: socket.socket) -> Reduced:
    check_subclass(sock, socket.socket)
    fd = sock.fileno()
    if fd < 0:
        raise refusal(sock, "it is closed")
    settings = (int(sock.family), int(sock.type), sock.proto, sock.gettimeout())
    return rebuild_socket, (type(sock), hand_over(fd, sock), *settings), attributes(sock)


def rebuild_socket(
    cls: type[socket.socket], index: int, family: int, kind: int, proto: int, timeout: float | None
) -> socket.socket:
    """A socket on descriptor `index` with the sender's timeout; O_NONBLOCK is never changed.

    O_NONBLOCK is on the description, shared with the sender, and Python sets it to match a socket's timeout
    (hazard M30). So the timeout is set only where the description says already what that timeout needs. A
    sender that has none, on a description that somebody made non-blocking, is rebuilt as non-blocking: that
    is how it behaves.
    """
    dealt = incoming()
    fd = dealt.number(index)
    nonblocking = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)
    if nonblocking or socket.getdefaulttimeout() is None:
        sock = cls(family, kind, proto, fileno=fd)
        dealt.settle(index, sock)
    else:
        # A default timeout here would make the constructor set O_NONBLOCK. Let it do so on a stand-in.
        with StandIn(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()) as spare:
            sock = cls(family, kind, proto, fileno=spare.fd)
            spare.become(fd)
        dealt.settle(index, sock)
        os.close(fd)
        sock.settimeout(None)
    if nonblocking:
        sock.settimeout(0.0 if timeout is None else timeout)
    return sock


def reduce_socket_io(raw: socket.SocketIO) -> Reduced:
    """`makefile()`'s raw layer. It gets a descriptor of its own, so that closing the file is enough."""
    check_subclass(raw, socket.SocketIO)
    open_number(raw)
    sock = raw._sock  # type: ignore[attr-defined]
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise refusal(raw, TLS_STAYS)
    _, arguments, *_ = reduce_socket(sock)
    return rebuild_socket_io, (arguments, raw.mode)


def rebuild_socket_io(arguments: tuple[Any, ...], mode: Any) -> Any:
    """What `socket.makefile(mode, buffering=0)` gives; the socket under it closes with it."""
    sock = rebuild_socket(*arguments)
    raw = sock.makefile(mode, buffering=0)
    incoming().rebuilt.append(raw)
    sock.close()  # only counted: the file holds it open (socket.makefile)
    return raw


def reduce_connection(connection: Any) -> Reduced:
    """A `multiprocessing` connection; plain pickle would carry its *number*, some other file over there."""
    check_subclass(connection, sys.modules["multiprocessing.connection"].Connection)
    if connection.closed:
        raise refusal(connection, "it is closed")
    fd = connection.fileno()
    readable, writable = connection.readable, connection.writable
    check_access(fd, connection, readable=readable, writable=writable)
    arguments = (type(connection), hand_over(fd, connection), readable, writable)
    return rebuild_connection, arguments, _other_attributes(connection)


def _other_attributes(connection: Any) -> dict[str, Any] | None:
    own = ("_handle", "_readable", "_writable")
    return {name: value for name, value in vars(connection).items() if name not in own} or None


def rebuild_connection(cls: Callable[..., Any], index: int, readable: bool, writable: bool) -> Any:
    """A `multiprocessing` connection on descriptor `index`."""
    dealt = incoming()
    connection: Closable = cls(dealt.number(index), readable, writable)
    dealt.settle(index, connection)
    return connection
