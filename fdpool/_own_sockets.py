"""Sockets of our own, whatever the program has done to the socket module.

`socket.setdefaulttimeout` would set O_NONBLOCK on what others share, as an object is made (hazard M30), and have us
wait for so long, and then raise TimeoutError, in what is only to be tried. And gevent's sockets, where it has patched
the module, wait though they are told not to (MSG_DONTWAIT): for what only who waits could have sent for.
"""

from __future__ import annotations

import os
import socket
from _socket import socket as _Socket  # the kernel's, which `socket.socket` adds files and handing on to
from _socket import socketpair
from typing import TypeVar

from .fds import above_stdio

_Made = TypeVar("_Made", bound=_Socket)

_HANDS_OFF: int | None = getattr(socket, "SOCK_NONBLOCK", None)


class OwnSocket(_Socket):
    """One that nobody else has."""

    __slots__ = ()

    def __enter__(self) -> OwnSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def own(fd: int) -> OwnSocket:
    """A socket that owns `fd`, for ourselves. Whether the description blocks is left as it is.

    Raises:
        OSError: `fd` is not a socket; it is still the caller's.
    """
    return _adopted(OwnSocket, fd)


def adopt(fd: int) -> socket.socket:
    """As `own`, for others: of the program's class, that is to say."""
    return _adopted(socket.socket, fd)


def _adopted(make: type[_Made], fd: int) -> _Made:
    if socket.getdefaulttimeout() is None:
        return make(fileno=fd)
    blocks = os.get_blocking(fd)
    if _HANDS_OFF is None:
        sock = make(fileno=fd)
    else:
        # An object that is said to be SOCK_NONBLOCK gets the timeout 0, and nothing is done to its descriptor. That
        # needs its type to be said as well, which a stand-in asks for.
        probe = _Socket(socket.AF_UNIX, socket.SOCK_STREAM | _HANDS_OFF, 0, fd)
        try:
            kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        finally:
            probe.detach()
        sock = make(type=kind | _HANDS_OFF, fileno=fd)
    sock.settimeout(None if blocks else 0.0)
    return sock


def made(family: int) -> socket.socket:
    """A new stream socket for others, above the standard streams."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(None)
        return sock if sock.fileno() > 2 else adopt(above_stdio(sock.detach()))
    except BaseException:
        sock.close()
        raise


def pair(kind: int) -> tuple[OwnSocket, OwnSocket]:
    """Two new Unix sockets of ours that are connected, above the standard streams."""
    ends: list[_Socket] = list(socketpair(socket.AF_UNIX, kind))
    made: list[OwnSocket] = []
    try:
        for end in ends:
            end.settimeout(None)
            made.append(own(above_stdio(end.detach())))
    except BaseException:
        for end in (*ends, *made):
            end.close()
        raise
    return made[0], made[1]
