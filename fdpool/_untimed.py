"""Socket objects without a timeout, whatever `socket.setdefaulttimeout` says: that is for a program's own connections.

With a default timeout the socket module would set O_NONBLOCK on what others share, as it makes an object (hazard M30),
and would wait for so long, and then raise TimeoutError, in what is only to be tried.
"""

from __future__ import annotations

import os
import socket

from .fds import above_stdio

_HANDS_OFF: int | None = getattr(socket, "SOCK_NONBLOCK", None)


def adopt(fd: int) -> socket.socket:
    """A socket object that owns `fd`. Whether the description blocks is left as it is.

    Raises:
        OSError: `fd` is not a socket; it is still the caller's.
    """
    if socket.getdefaulttimeout() is None:
        return socket.socket(fileno=fd)
    blocks = os.get_blocking(fd)
    if _HANDS_OFF is None:
        sock = socket.socket(fileno=fd)
    else:
        # An object that is said to be SOCK_NONBLOCK gets the timeout 0, and nothing is done to its descriptor. That
        # needs its type to be said as well, which a stand-in asks for.
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | _HANDS_OFF, 0, fileno=fd)
        try:
            kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        finally:
            probe.detach()
        sock = socket.socket(type=kind | _HANDS_OFF, fileno=fd)
    sock.settimeout(None if blocks else 0.0)
    return sock


def made(family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A new socket, above the standard streams."""
    sock = socket.socket(family, kind)
    try:
        sock.settimeout(None)
        return sock if sock.fileno() > 2 else adopt(above_stdio(sock.detach()))
    except BaseException:
        sock.close()
        raise


def pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """Two new Unix sockets that are connected, above the standard streams."""
    first, second = socket.socketpair(socket.AF_UNIX, kind)
    try:
        for end in (first, second):
            end.settimeout(None)
        first = adopt(above_stdio(first.detach()))
        return first, adopt(above_stdio(second.detach()))
    except BaseException:
        first.close()
        second.close()
        raise
