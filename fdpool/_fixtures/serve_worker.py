"""The worker's half of `serve`: a function that serves, with its output in the log and its end by SIGTERM.

Runs in: a worker that serves one server, and no other.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .. import _platform
from .._trees import WORKER_MARK
from ..fds import Fd, OwnedFds
from ..sockets import StreamSocket
from . import coverage


class Around(NamedTuple):
    """What a test may have changed for its server, since the workers' supervisor was started: with `monkeypatch`, say.

    Attributes:
        environment: all of it.
        folder: the working directory; None if it is gone.
        path: `sys.path`.
    """

    environment: dict[str, str]
    folder: str | None
    path: list[str]

    @classmethod
    def here(cls) -> Around:
        """As it is in this process."""
        return cls(dict(os.environ), working_directory(), list(sys.path))

    def take_over(self) -> None:
        """Runs in: the worker. Have it so in this process; what says whose worker this is stays."""
        for name in os.environ.keys() - self.environment.keys() - {WORKER_MARK}:
            del os.environ[name]
        for name, value in self.environment.items():
            if (
                name != WORKER_MARK and os.environ.get(name) != value
            ):  # setting each costs three times as much
                os.environ[name] = value
        if self.folder is not None:
            os.chdir(self.folder)
        sys.path[:] = self.path


def working_directory() -> str | None:
    """The working directory, or None if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def serve(
    fn: Callable[..., Any],
    listening: socket.socket,
    args: tuple[Any, ...],
    log: Fd,
    link: Fd,
    around: Around,
    measured: dict[str, Any] | None,
) -> bool:
    """Call `fn(listening, *args)`, with `ready=` if it takes such; a coroutine is run to its end.

    Returns:
        True if SIGTERM ended it.

    Args:
        log: where standard output and error go.
        link: one end of a Unix stream pair; `{"pid": n}` goes there with a pidfd, later perhaps `{"ready": true}`.
        around: the test's environment, working directory and path.
        measured: how coverage is to be measured, or None.
    """
    _redirect(log)
    around.take_over()
    signal.signal(signal.SIGTERM, _leave)
    told = StreamSocket.from_fd(link.detach(), max_bytes=4096)
    pidfd = _platform.open_pidfd(os.getpid())
    owned = OwnedFds([] if pidfd is None else [pidfd])
    told.send_with_fds({"pid": os.getpid()}, owned.numbers)
    owned.close()
    options = {"ready": lambda: told.send({"ready": True})} if takes_ready(fn) else {}
    with coverage.measuring(measured):
        try:
            result = fn(listening, *args, **options)
            if inspect.iscoroutine(result):
                import asyncio

                asyncio.run(result)
        except (
            _Stopped
        ):  # the usual end; as an error it would travel with a traceback, which takes milliseconds
            return True
    return False


class _Stopped(SystemExit):
    """What SIGTERM raises in the function; to it, and to what it calls, an exit as any other."""


def takes_ready(fn: Callable[..., Any]) -> bool:
    """True if the function has a parameter called `ready`, and so says itself when it is."""
    try:
        return "ready" in inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False


def _leave(_number: int, _frame: object) -> NoReturn:
    raise _Stopped(0)


def _redirect(log: Fd) -> None:
    """Send both standard streams to the log, line by line, whether Python writes or the programs that it starts; and
    the stacks, should the interpreter crash."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    log.close()
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        setattr(sys, name, stream)
    faulthandler.enable(2)
