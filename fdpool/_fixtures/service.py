"""`session_service`: one server for all processes of a test run, counted by who holds it.

Whoever asks first starts its keeper (`_fixtures.keeper`); the keeper hands the listener's descriptor to everybody who
asks, over a Unix socket in a folder that only this user may enter.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import functools
import hashlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import _own_sockets, _platform
from ..sockets import StreamSocket
from . import keeper
from .errors import ServerDied
from .holdings import LASTING
from .keeper import Order
from .listener import PATH_BYTES, Listener, Reachable, folder_for_sockets
from .runs import pickled_for_others

_ATTEMPTS = 10
_NAME_ROOM = 60  # for the folder's own name, 29 bytes, and that of a service
_OF_THE_ASKER = ("env", "ready_timeout")  # options that may differ between those who mean the same service
_MOST_WORDS = 200  # characters that an error has of what a service was given


class Service(Reachable):
    """A server that all processes of the test run share. It ends when none of them holds it.

    Attributes:
        name: what it is called by all of them.
        what: what serves: the name of a function or an application, or a command.
        listener: the socket that it serves on; a duplicate of this process's own.
        pid: of the process that serves.
    """

    def __init__(
        self, name: str, what: str, given: str, hold: StreamSocket, listener: Listener, log_fd: int, pid: int
    ) -> None:
        self.name = name
        self.what = what
        self._given = given  # as in its `Order`
        self.listener = listener
        self.pid = pid
        self._hold = hold
        self._log_fd = log_fd
        self._numbers = {hold.fileno(), listener.fileno(), log_fd}
        LASTING.update(self._numbers)

    @property
    def logs(self) -> str:
        """What it wrote to standard output and error so far, whoever was its client."""
        return os.pread(self._log_fd, os.fstat(self._log_fd).st_size, 0).decode(errors="backslashreplace")

    def close(self) -> None:
        """Let go of it."""
        LASTING.difference_update(self._numbers)
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
        self._folder = os.path.join(folder_for_sockets(_NAME_ROOM), f"fdpool-tests-{digest}")
        self._held: dict[str, Service] = {}

    def __call__(self, name: str, app: Any, *args: Any, **options: Any) -> Service:
        """The service of that name; if there is none yet, it is started as `serve(app, *args, **options)`.

        Args:
            name: the same in all processes; a file's name is made of it.

        Raises:
            ValueError: the name is none, or is that of another service, or was given to one with other arguments.
            ServerDied: it could not be started, whoever has tried.
            NotPicklable: it cannot travel. Descriptors cannot.
        """
        return self._get(name, Order(_name_of(app), _given(args, options), False, (app, *args), options))

    def command(self, name: str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> Service:
        """As a call, for `serve.command(argv, **options)`."""
        # What is not UTF-8 is the keeper's word as well, which is JSON.
        what = argv if isinstance(argv, str) else " ".join(map(str, argv))
        what = what.encode(errors="backslashreplace").decode()
        return self._get(name, Order(what, _given((), options), True, (argv,), options))

    def close(self) -> None:
        """Let go of all."""
        while self._held:
            self._held.popitem()[1].close()

    def _get(self, name: str, order: Order) -> Service:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"a service is named by a string without slashes, not {name!r}")
        if name in (".", "..") or name.endswith(".lock"):
            raise ValueError(f"a service cannot be called {name!r}: a folder is, or another service's lock")
        path = os.path.join(self._folder, name)
        if len(os.fsencode(path)) > PATH_BYTES:
            raise ValueError(f"the service's name is too long for a Unix socket in {self._folder}: {name!r}")
        if name not in self._held:
            self._held[name] = self._connect(name, path, order)
        found = self._held[name]
        if found.what != order.what:
            raise ValueError(
                f"the service {name!r} is {found.what}, and {order.what} needs a name of its own"
            )
        was, wanted = found._given, order.given
        if was != wanted:
            raise ValueError(
                f"the service {name!r} was started with {was[:_MOST_WORDS]}, and with {wanted[:_MOST_WORDS]} "
                f"{order.what} needs a name of its own"
            )
        return found

    def _connect(self, name: str, path: str, order: Order) -> Service:
        pickled = pickled_for_others(order)
        for _ in range(_ATTEMPTS):
            log_fd = _platform.anonymous_file("fdpool-keeper-log")
            try:
                hold = self._hold(path, pickled, log_fd)
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
                raise ServerDied(
                    f"the service {name} could not be started: {answer['error']}", answer["logs"]
                )
            listening = _own_sockets.adopt(numbers[0])
            listener = Listener(listening, answer["kind"])
            return Service(name, answer["what"], answer["given"], hold, listener, numbers[1], answer["pid"])
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
        """Make it, if it is not there; it may go at any time, as the last keeper does."""
        while True:
            try:
                os.mkdir(self._folder, 0o700)
                return
            except FileExistsError:
                pass
            try:
                found = os.lstat(self._folder)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(f"{self._folder} is not a folder that only this user may enter")
            return


def _name_of(app: Any) -> str:
    if isinstance(app, str):
        return app
    if isinstance(app, functools.partial):
        return f"{_name_of(app.func)}({_given(app.args, app.keywords)})"
    named = app if hasattr(app, "__qualname__") and hasattr(app, "__module__") else type(app)
    return f"{named.__module__}.{named.__qualname__}"


def _given(args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a service is given, in words that are the same in all processes that mean the same."""
    words = [_in_words(each) for each in args]
    words += [f"{key}={_in_words(options[key])}" for key in sorted(options) if key not in _OF_THE_ASKER]
    return ", ".join(words) or "no arguments"


def _in_words(value: Any) -> str:
    """Of plain data its value. Of all else only what it is, as two processes have no way of comparing that."""
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_in_words, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(_in_words, value)))})"
    if isinstance(value, dict):
        items = sorted(f"{_in_words(key)}: {_in_words(each)}" for key, each in value.items())
        return f"{type(value).__name__}({', '.join(items)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _in_words({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return _name_of(value)
