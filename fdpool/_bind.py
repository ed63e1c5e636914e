"""Listening sockets from what a user writes: opened, or taken over from whoever has opened them.

A path of the file system is replaced only if nobody listens there, and removed only by whom it belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Union

from . import _own_sockets, _systemd
from ._bind_sockets import OwnPath, listen_beside, listen_tcp, listen_unix, why_not
from ._bind_spec import FromSystemd, Inherited, Spec, Tcp, Unix, parse
from .errors import BindFailed
from .fds import duplicate

Bind = Union[str, int, socket.socket, Sequence[Union[str, int, socket.socket]]]

BACKLOG = 2048  # the kernel lowers it to net.core.somaxconn


class Listener:
    """A listening socket, where it listens, and what has to go with it.

    Attributes:
        socket: the listener's own. Its blocking mode is as it was found: it belongs to the open file description,
            so whoever else holds that has set it too.
        address: `tcp://127.0.0.1:8000`, `tcp://[::1]:8000`, `unix:/run/x.sock` or `unix:@name`. A bind, too, but for
            that of `":8000"`, `tcp://[::]:8000`, which is for IPv6 alone as a bind.

    Not thread-safe.
    """

    __slots__ = ("_own_path", "_pid", "address", "socket")

    def __init__(self, listening: socket.socket, own_path: OwnPath | None = None) -> None:
        self.socket = listening
        self.address = address_of(listening)
        self._own_path = own_path
        self._pid = os.getpid()

    def handover(self, number: int) -> str:
        """The bind that makes this listener in another process, which holds the socket as descriptor `number`.

        The file of a Unix socket is the other's then, so this one is to be closed with `keep_path`.
        """
        if self._own_path is None:
            return f"fd:{number}"
        device, inode = self._own_path.identity
        return f"fd:{number}?owns={device}-{inode}"

    def close(self, *, keep_path: bool = False) -> None:
        """Close the socket, and remove its file: if it is still that of this socket, and this process made it.

        The socket is closed, not shut down, so whoever else holds it goes on accepting. Safe to call again.
        """
        own, self._own_path = self._own_path, None
        if own is not None and not keep_path and self._pid == os.getpid():
            own.remove()
        self.socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Listener {self.address}>"


def open_listeners(bind: Bind, *, backlog: int = BACKLOG, reuseport: bool = False) -> list[Listener]:
    """Listeners for all that `bind` says; at least one, all listening, close-on-exec, the caller's to close.

    Args:
        bind: one or several of these.

            - `"HOST:PORT"`: every address that the host's name has. `"[::1]:8000"` for IPv6; `":8000"` for every
              address of the machine, of both families; port 0 for one that is free.
            - a number: that port of 127.0.0.1.
            - `"unix:PATH"`, with permissions `"unix:PATH?mode=660"`; `"unix:@NAME"` is abstract. What a dead server has
              left at the path is replaced.
            - `"fd:N"` and open sockets are borrowed: the listener has a duplicate. One that is bound and does not
              listen yet is told to.
            - `"systemd"`, `"systemd:NAME"`: the sockets that systemd has passed, borrowed, too; see
              `_systemd.passed_sockets`.
        backlog: connections that the kernel keeps waiting; not for those that listen already.
        reuseport: set SO_REUSEPORT, so that more listeners can be opened at the same address.

    Raises:
        ValueError, TypeError: a bind cannot be understood.
        BindFailed: it cannot be listened there. Nothing is left open, and no file that was not there.
    """
    # Bytes are no bind, and a sequence of numbers, which would be taken for ports.
    binds = [bind] if isinstance(bind, (str, bytes, bytearray, int, socket.socket)) else bind
    specs = [_spec(each) for each in binds]
    if not specs:
        raise ValueError("there is nothing to listen on: no bind was given")
    with contextlib.ExitStack() as opened:
        passed = _passed_by_systemd(specs)
        listeners: list[Listener] = []
        for spec in specs:
            for listener in _open(spec, passed, backlog, reuseport):
                opened.enter_context(listener)
                listeners.append(listener)
        opened.pop_all()
    return listeners


def open_beside(member: Listener, *, backlog: int = BACKLOG) -> Listener:
    """Another listener at the address of one that was opened with `reuseport`, for the kernel to choose between them;
    the caller's to close.

    Raises:
        BindFailed: it cannot be.
    """
    try:
        return Listener(listen_beside(member.socket, backlog))
    except OSError as error:
        raise BindFailed(f"cannot listen on {member.address}: {why_not(error)}", error.errno) from error


def _spec(bind: object) -> Spec | socket.socket:
    if isinstance(bind, socket.socket):
        return bind
    if isinstance(bind, str):
        return parse(bind)
    if isinstance(bind, int) and not isinstance(bind, bool):
        return parse(f"127.0.0.1:{bind}")
    raise TypeError(f"cannot listen on {bind!r}: a bind is a string such as 'HOST:PORT', a port or a socket")


def _passed_by_systemd(specs: Sequence[Spec | socket.socket]) -> list[tuple[str, socket.socket]]:
    asks = any(isinstance(spec, FromSystemd) for spec in specs)
    return _systemd.passed_sockets() if asks else []


def _open(
    spec: Spec | socket.socket, passed: list[tuple[str, socket.socket]], backlog: int, reuseport: bool
) -> Iterable[Listener]:
    if isinstance(spec, Tcp):
        return [Listener(each) for each in listen_tcp(spec, backlog, reuseport)]
    if isinstance(spec, Unix):
        if reuseport:
            raise ValueError(f"SO_REUSEPORT is for TCP, not for unix:{spec.path}")
        return [Listener(*listen_unix(spec, backlog))]
    if isinstance(spec, FromSystemd):
        chosen = [each for each in passed if spec.name in (None, each[0])]
        if not chosen:
            raise BindFailed(_why_none(spec, passed))
        for each in chosen:
            passed.remove(each)
        return (_borrowed(*each) for each in chosen)
    return [_adopt(spec, backlog, reuseport)]


def _why_none(spec: FromSystemd, passed: Sequence[tuple[str, socket.socket]]) -> str:
    if spec.name is not None and passed:
        names = ", ".join(name for name, _ in passed)
        return f"systemd has passed no socket named {spec.name!r}; what is left of them: {names}"
    return (
        "systemd has passed no socket to this process: is it started by a socket unit, as the unit's main process, and "
        "is each of its sockets bound once?"
    )


# -- what is open already --------------------------------------------------------------------------


def _adopt(given: Inherited | socket.socket, backlog: int, reuseport: bool) -> Listener:
    """A listener on a duplicate of what was given."""
    if isinstance(given, Inherited):
        what, number, owns = f"fd:{given.number}", given.number, given.owns
    else:
        what, number, owns = repr(given), given.fileno(), None
        ssl = sys.modules.get("ssl")
        if ssl is not None and isinstance(given, ssl.SSLSocket):
            raise BindFailed(
                f"cannot listen on {what}: its TLS lives in this process alone; give the plain socket"
            )
    try:
        listening = _copy_of(number)
    except OSError as error:
        raise BindFailed(f"cannot listen on {what}: {why_not(error)}", error.errno) from error
    try:
        problem = _listen_on(listening, backlog, reuseport)
        if problem is not None:
            raise BindFailed(f"cannot listen on {what}: {problem}")
        path = listening.getsockname() if listening.family == socket.AF_UNIX else None
        own = OwnPath(os.path.abspath(path), owns) if owns is not None and isinstance(path, str) else None
        return Listener(listening, own)
    except BaseException:
        listening.close()
        raise


def _borrowed(name: str, passed: socket.socket) -> Listener:
    try:
        return Listener(_copy_of(passed.fileno()))
    except OSError as error:
        raise BindFailed(f"cannot listen on systemd:{name}: {why_not(error)}", error.errno) from error


def _copy_of(number: int) -> socket.socket:
    copy = duplicate(number)
    try:
        return _own_sockets.adopt(copy)
    except BaseException:
        os.close(copy)
        raise


def _listen_on(given: socket.socket, backlog: int, reuseport: bool) -> str | None:
    """Have it listen, if it does not yet; else why that cannot be."""
    if given.type != socket.SOCK_STREAM:
        return f"it is a {given.type.name} socket, which takes no connections"
    if reuseport and not given.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return "it was bound without SO_REUSEPORT, which must be set before"
    if given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    name = given.getsockname()
    if not name or (isinstance(name, tuple) and name[1] == 0):
        return "it is not bound to any address"
    try:
        given.listen(backlog)
    except OSError as error:
        return "it is a connection" if error.errno == errno.EINVAL else why_not(error)
    return None


def address_of(listening: socket.socket) -> str:
    """Where a socket is bound, as text that `parse` takes back (of the families that it knows)."""
    name = listening.getsockname()
    if listening.family == socket.AF_INET:
        return f"tcp://{name[0]}:{name[1]}"
    if listening.family == socket.AF_INET6:
        zone = f"%{socket.if_indextoname(name[3])}" if name[3] else ""
        return f"tcp://[{name[0]}{zone}]:{name[1]}"
    if listening.family == socket.AF_UNIX:
        is_abstract = isinstance(name, bytes)
        return f"unix:@{os.fsdecode(name[1:])}" if is_abstract else f"unix:{os.path.abspath(name)}"
    return f"{socket.AddressFamily(listening.family).name}:{name}"
