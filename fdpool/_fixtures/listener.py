"""`Listener`: a listening socket that is bound before anybody serves on it, and is handed over by descriptor.

So nobody else can take the port in between, and a client may connect at once: the kernel keeps its connection, and
what it sends, until the server gets there.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

from .. import _own_sockets

Kind = Literal["tcp", "tcp6", "unix"]

BACKLOG = 128

# Kernel: the path of a Unix socket has room for 107 bytes (unix(7)), on macOS for 103. So it is not in tmp_path either.
PATH_BYTES = 103

_HOSTS = {"tcp": "127.0.0.1", "tcp6": "::1"}


class Listener:
    """A listening socket of a test. Tasks may carry it; there it is the same socket, and so is its copy.

    Attributes:
        socket: the listening socket, blocking.
        kind: "tcp", "tcp6" or "unix".

    Closing it takes a Unix socket's path along, but not in the copy that a task has received.
    """

    def __init__(
        self, listening: socket.socket, kind: Kind, folder: str | None = None, backlog: int = BACKLOG
    ) -> None:
        self.socket = listening
        self.kind: Kind = kind
        self._folder = folder
        self._backlog = backlog
        self._refuses = False
        self._name = listening.getsockname()

    @classmethod
    def open(cls, kind: Kind = "tcp", host: str | None = None, backlog: int = BACKLOG) -> Listener:
        """Bind a free port of `host`, or a fresh path, and listen.

        Raises:
            ValueError: there is no such kind, or a host for a Unix socket.
            OSError: the host is not ours to bind, or there is no such family here.
        """
        if kind == "unix":
            if host is not None:
                raise ValueError(f"a Unix socket has no host, so {host!r} cannot be its")
            return cls._open_unix(backlog)
        if kind not in _HOSTS:
            raise ValueError(f"kind must be 'tcp', 'tcp6' or 'unix', not {kind!r}")
        listening = _bound(kind, host or _HOSTS[kind])
        try:
            listening.listen(backlog)
        except BaseException:
            listening.close()
            raise
        return cls(listening, kind, None, backlog)

    @classmethod
    def reserve(cls, kind: Kind = "tcp") -> Listener:
        """Bind a free port and do not listen: for a program that binds it by itself, with SO_REUSEADDR as most do.

        Kernel: meanwhile nobody is given that port who asks for any (bind(2) with port 0 passes over bound ones).

        Raises:
            ValueError: `kind` has no ports.
        """
        if kind not in _HOSTS:
            raise ValueError(f"only a TCP port can be kept for a program, not {kind!r}")
        return cls(_bound(kind, _HOSTS[kind]), kind)

    @classmethod
    def _open_unix(cls, backlog: int) -> Listener:
        folder = tempfile.mkdtemp(prefix="fdpool-", dir=folder_for_sockets())
        listening = _own_sockets.made(socket.AF_UNIX)
        try:
            listening.bind(f"{folder}/socket")
            listening.listen(backlog)
        except BaseException:
            listening.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(listening, "unix", folder, backlog)

    def fileno(self) -> int:
        """The descriptor's number, so that it can be handed over wherever one can."""
        return self.socket.fileno()

    @property
    def address(self) -> Any:
        """What `socket.connect` takes: (host, port), or a path."""
        return self._name if self.kind == "unix" else self._name[:2]

    @property
    def host(self) -> str:
        """The host that it is bound to; of a Unix socket, "localhost"."""
        return "localhost" if self.kind == "unix" else str(self._name[0])

    @property
    def port(self) -> int:
        """The port that it is bound to.

        Raises:
            ValueError: a Unix socket has none.
        """
        if self.kind == "unix":
            raise ValueError(f"a Unix socket has no port; its path is {self.path}")
        return int(self._name[1])

    @property
    def path(self) -> str:
        """The path that it is bound to.

        Raises:
            ValueError: only a Unix socket has one.
        """
        if self.kind != "unix":
            raise ValueError(f"a TCP socket has no path; its address is {self.address}")
        return str(self._name)

    @property
    def netloc(self) -> str:
        """Host and port as they stand in a URL; of a Unix socket its path, quoted."""
        if self.kind == "unix":
            return quote(self.path, safe="")
        return f"[{self.host}]:{self.port}" if self.kind == "tcp6" else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """`http://host:port`; of a Unix socket `http+unix://` and its quoted path, as requests-unixsocket has it."""
        return f"http{'+unix' if self.kind == 'unix' else ''}://{self.netloc}"

    def connect(self, timeout: float | None = 10.0) -> socket.socket:
        """A new connection to it, the caller's to close. Need not wait for a server."""
        connection = socket.socket(self.socket.family)
        try:
            connection.settimeout(timeout)
            connection.connect(self._name)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close it here, and remove a Unix socket's path; safe to call again. Servers keep their own copies."""
        self.socket.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def refuse(self) -> None:
        """Turn away whoever waits for a server, and whoever comes: for when there will be none any more."""
        # Kernel: shutting down a listening TCP socket ends listening for every holder, and resets what was not
        # accepted yet. The clients in a Unix socket's queue are let go of when its last holder closes it.
        if self.kind == "unix":
            self.socket.close()
        else:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it is closed, or never listened
        self._refuses = True

    def revive(self) -> None:
        """Listen again at the same address after `refuse`; else nothing happens.

        Raises:
            OSError: it was closed, and so its address is not its own any more.
        """
        if not self._refuses:
            return
        if self.kind == "unix":
            if self._folder is None:
                raise OSError(errno.EBADF, f"the listener at {self._name} is closed")
            os.unlink(self._name)
            self.socket = _own_sockets.made(socket.AF_UNIX)
            self.socket.bind(self._name)
        self.socket.listen(self._backlog)
        self._refuses = False

    def __reduce__(self) -> tuple[Callable[..., Listener], tuple[object, ...]]:
        return _arrived, (self.socket, self.kind)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "closed" if self.socket.fileno() < 0 else f"on descriptor {self.fileno()}"
        return (
            f"<Listener {self.kind} {os.fspath(self._name) if self.kind == 'unix' else self.netloc} {where}>"
        )


class Reachable:
    """Something that serves on a listener.

    Attributes:
        listener: that one.
    """

    listener: Listener

    @property
    def url(self) -> str:
        """As `Listener.url`."""
        return self.listener.url

    @property
    def address(self) -> Any:
        """As `Listener.address`."""
        return self.listener.address


class ListenerFactory:
    """Makes listeners, and closes them all: the fixture `listener_factory` is one."""

    def __init__(self) -> None:
        self._made: list[Listener] = []

    def __call__(self, kind: Kind = "tcp", *, host: str | None = None, backlog: int = 128) -> Listener:
        """A new listening socket: "tcp" on 127.0.0.1, "tcp6" on ::1, or "unix" on a path of its own.

        Raises:
            ValueError, OSError: as `Listener.open`.
        """
        listener = Listener.open(kind, host, backlog)
        self._made.append(listener)
        return listener

    def close(self) -> None:
        """Close all of them."""
        while self._made:
            self._made.pop().close()


def folder_for_sockets(room: int = 40) -> str:
    """The folder for temporary files; or /tmp, if a path of `room` more bytes would be too long for a Unix socket."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) + room <= PATH_BYTES else "/tmp"


def _bound(kind: Kind, host: str) -> socket.socket:
    """A socket on a free port, which it keeps for good.

    Kernel: a port that bind(2) has chosen goes back when the socket stops listening; one that was asked for does not.
    So one socket finds a port, and the other asks for it.
    """
    family = socket.AF_INET6 if kind == "tcp6" else socket.AF_INET
    with socket.socket(family) as finding:
        keeping = _own_sockets.made(family)
        try:
            for each in (finding, keeping):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            finding.bind((host, 0))
            keeping.bind(finding.getsockname())
        except BaseException:
            keeping.close()
            raise
    return keeping


def _arrived(listening: socket.socket, kind: Kind) -> Listener:
    return Listener(listening, kind)
