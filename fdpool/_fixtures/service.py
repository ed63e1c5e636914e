"""`session_service`: one server for all processes of a test run, counted by who holds it.

Whoever asks first starts its keeper (`_fixtures.keeper`); the keeper hands the listener's descriptor to everybody who
asks, over a Unix socket in a folder that only this user may enter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import _platform
from ..sockets import StreamSocket
from . import keeper
from .errors import ServerDied
from .keeper import Order
from .listener import Listener, Reachable
from .runs import pickled_for_others

_ATTEMPTS = 10


class Service(Reachable):
    """A server that all processes of the test run share. It ends when none of them holds it.

    Attributes:
        name: what it is called by all of them.
        listener: the socket that it serves on; a duplicate of this process's own.
        pid: of the process that serves.
    """

    def __init__(self, name: str, hold: StreamSocket, listener: Listener, log_fd: int, pid: int) -> None:
        self.name = name
        self.listener = listener
        self.pid = pid
        self._hold = hold
        self._log_fd = log_fd

    @property
    def logs(self) -> str:
        """What it wrote to standard output and error so far, whoever was its client."""
        return os.pread(self._log_fd, os.fstat(self._log_fd).st_size, 0).decode(errors="backslashreplace")

    def close(self) -> None:
        """Let go of it."""
        self._hold.close()
        self.listener.socket.close()
        os.close(self._log_fd)

    def __repr__(self) -> str:
        return f"<Service {self.name} at {self.url}>"


class Services:
    """Finds or starts services, and lets go of them at the end; the fixture `session_service` is one.

    Args:
        run: what all processes of the test run, and no others, have in common.
    """

    def __init__(self, run: str) -> None:
        digest = hashlib.sha256(f"{os.getuid()} {run}".encode()).hexdigest()[:16]
        self._folder = os.path.join(tempfile.gettempdir(), f"fdpool-tests-{digest}")
        self._held: dict[str, Service] = {}

    def __call__(self, name: str, app: Any, *args: Any, **options: Any) -> Service:
        """The service of that name; if there is none yet, it is started as `serve(app, *args, **options)`.

        Args:
            name: the same in all processes; a file's name is made of it.

        Raises:
            ServerDied: it could not be started, whoever has tried.
            NotPicklable: it cannot travel. Descriptors cannot.
        """
        return self._get(name, Order(False, (app, *args), options))

    def command(self, name: str, argv: list[str], **options: Any) -> Service:
        """As a call, for `serve.command(argv, **options)`."""
        return self._get(name, Order(True, (argv,), options))

    def close(self) -> None:
        """Let go of all."""
        while self._held:
            self._held.popitem()[1].close()

    def _get(self, name: str, order: Order) -> Service:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"a service is named by a string without slashes, not {name!r}")
        if name not in self._held:
            self._held[name] = self._connect(name, pickled_for_others(order))
        return self._held[name]

    def _connect(self, name: str, order: bytes) -> Service:
        path = os.path.join(self._folder, name)
        for _ in range(_ATTEMPTS):
            log_fd = _platform.anonymous_file("fdpool-keeper-log")
            try:
                hold = self._hold(path, order, log_fd)
                try:
                    answer, numbers = hold.receive_with_fds()
                except (EOFError, ConnectionError):  # the last holder went as we came
                    hold.close()
                    continue
            finally:
                said = os.pread(log_fd, 1 << 16, 0).decode(errors="backslashreplace")
                os.close(log_fd)
            if "error" in answer:
                hold.close()
                raise ServerDied(f"the service {name} could not be started: {answer['error']}")
            listening = socket.socket(fileno=numbers[0])
            return Service(name, hold, Listener(listening, answer["kind"]), numbers[1], answer["pid"])
        raise ServerDied(f"the service {name} could not be started", said)

    def _hold(self, path: str, order: bytes, log_fd: int) -> StreamSocket:
        """A connection to the keeper, which is started if there is none."""
        with self._locked(path):
            client = socket.socket(socket.AF_UNIX)
            try:
                try:
                    client.connect(path)
                except (FileNotFoundError, ConnectionRefusedError):
                    with socket.socket(socket.AF_UNIX) as door:
                        if os.path.exists(path):
                            os.unlink(path)  # of a keeper that was killed
                        door.bind(path)
                        door.listen(128)
                        client.connect(path)
                        keeper.spawn(path, door, order, log_fd)
                return StreamSocket.from_fd(client.detach())
            except BaseException:
                client.close()
                raise

    @contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        """Only one process at a time is here. A keeper removes the lock's file as it goes, so that is checked."""
        while True:
            self._make_folder()
            try:
                lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # the folder has just gone
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    current = os.stat(f"{path}.lock").st_ino == os.fstat(lock).st_ino
                except FileNotFoundError:
                    current = False
                if current:
                    yield
                    return
            finally:
                os.close(lock)

    def _make_folder(self) -> None:
        try:
            os.mkdir(self._folder, 0o700)
        except FileExistsError:
            found = os.lstat(self._folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(
                    f"{self._folder} is not a folder that only this user may enter"
                ) from None
