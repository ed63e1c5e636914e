"""One run of a server in a worker: a function, or a program. `Served` starts, watches and ends such runs."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, Protocol

from .._broken import WorkerLost, describe_status
from .._completed import CompletedCommand
from ..errors import NotPicklable
from ..fds import Fd, HasFileno, is_readable
from ..pool import Pool
from ..sockets import StreamSocket
from . import coverage
from .importing import finder_for_others, is_of_tests
from .serve_worker import Around, serve, takes_ready, working_directory

#: Where programs that can be activated by systemd expect their first listener (sd_listen_fds(3)).
FIRST_LISTENER = 3


class Run(Protocol):
    """A server that has been started."""

    future: Future[Any]

    @property
    def pid(self) -> int:
        """Its process id; waits until it has been started."""

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""

    def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after so many seconds; returns when its process is gone."""

    def killed_by(self) -> int | None:
        """The signal that has ended it, or None; once its future is done."""

    def is_success(self) -> bool:
        """True if it has ended as programs do that succeed; once its future is done."""

    def describe_end(self) -> str:
        """In words how it has ended; once its future is done."""


class FunctionRun:
    """A function that serves in a worker of its own.

    Args:
        carried: what the test gave: the function, or what it is to serve.

    Raises:
        NotPicklable, DescriptorRefused: it cannot travel to the worker.
    """

    def __init__(
        self,
        pool: Pool,
        fn: Callable[..., Any],
        listening: socket.socket,
        args: tuple[Any, ...],
        log_fd: int,
        carried: Any,
    ) -> None:
        self._link, theirs = StreamSocket.pair(max_bytes=4096)
        self._pid: int | None = None
        self._pidfd: int | None = None
        self.tells_ready = takes_ready(fn)
        try:
            measured = coverage.settings()
            call = (fn, listening, args, Fd(log_fd), Fd(theirs), Around.here(), measured)
            self.future: Future[Any] = _submit(pool, carried, call)
        except BaseException:
            self._link.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        if self._pid is None:
            message, numbers = self._link.receive_with_fds()
            self._pid = int(message["pid"])
            self._pidfd = numbers[0] if numbers else None
        return self._pid

    def link_fd(self) -> int:
        """Readable when there is news of the worker."""
        self.pid  # noqa: B018 - receives what comes first
        return self._link.fileno()

    def said_ready(self) -> bool:
        """Take the news that has come: True if the server is ready, False if it has gone."""
        try:
            return bool(self._link.receive().get("ready"))
        except (EOFError, OSError):
            return False

    def signal(self, number: int) -> None:
        try:
            pid = self.pid
            if self._pidfd is None:
                os.kill(pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)
        except (OSError, EOFError):
            pass  # it has ended

    def end(self, grace_s: float) -> None:
        if not self.future.cancel():
            self.signal(signal.SIGTERM)
            if not self._is_gone(grace_s):
                self.signal(signal.SIGKILL)
                self._is_gone(None)
            self.future.exception()
        self._link.close()
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def _is_gone(self, limit_s: float | None) -> bool:
        """Wait for the worker's end. Its answer comes before that, and its exit handlers after its answer."""
        if self._pidfd is None:
            try:
                self.future.exception(limit_s)
            except FutureTimeoutError:
                return False
            return True
        return is_readable(self._pidfd, limit_s)

    def killed_by(self) -> int | None:
        error = self.future.exception()
        return error.signal if isinstance(error, WorkerLost) else None

    def is_success(self) -> bool:
        error = self.future.exception()
        return error is None or (isinstance(error, SystemExit) and error.code in (None, 0))

    def describe_end(self) -> str:
        error = self.future.exception()
        if error is None:
            return "has ended at SIGTERM" if self.future.result() else "has returned"
        if isinstance(error, SystemExit):
            return f"exited with {error.code!r}"
        if isinstance(error, WorkerLost):
            if error.signal is not None:
                return describe_status(error.signal)  # which is the wait status, too
            return f"exited with status {error.exit_code}"
        came = "".join(f"\n{cause}" for cause in [error.__cause__] if cause is not None)
        return f"raised {type(error).__name__}: {error}{came}"


class ProgramRun:
    """A program that runs in a worker, on descriptors under the numbers that it expects.

    Args:
        fds: number in the program -> descriptor here.
            Those from 3 on without a gap are named in LISTEN_FDS and LISTEN_PID, as systemd does it.

    Raises:
        ValueError, TypeError, DescriptorRefused: as `Pool.popen`.
    """

    tells_ready = False

    def __init__(
        self,
        pool: Pool,
        argv: Sequence[str],
        fds: Mapping[int, int | HasFileno],
        log_fd: int,
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        arguments = [str(argument) for argument in argv]
        listeners = next(count for count in itertools.count() if FIRST_LISTENER + count not in fds)
        if listeners:
            # The program's process id is only known in the program's own process.
            arguments = ["/bin/sh", "-c", 'LISTEN_PID=$$; export LISTEN_PID; exec "$@"', "sh", *arguments]
            environment["LISTEN_FDS"] = str(listeners)
        folder = working_directory() if cwd is None else cwd
        self._command = pool.popen(
            arguments, fds=fds, stdout=log_fd, stderr=log_fd, env=environment, cwd=folder
        )
        self.future: Future[CompletedCommand] = self._command.future

    @property
    def pid(self) -> int:
        return self._command.pid

    def signal(self, number: int) -> None:
        try:
            self._command.send_signal(number)
        except (OSError, RuntimeError):
            pass  # it never began, or is over

    def end(self, grace_s: float) -> None:
        self._command.end(grace_s)
        try:
            if not self.future.cancelled():
                self.future.exception()
        finally:
            self._command.close()

    def killed_by(self) -> int | None:
        if self.future.exception() is not None:
            return None
        code = self.future.result().returncode
        return -code if code < 0 else None

    def is_success(self) -> bool:
        return self.future.exception() is None and self.future.result().returncode == 0

    def describe_end(self) -> str:
        error = self.future.exception()
        if error is not None:
            return f"could not run: {error}"
        code = self.future.result().returncode
        return describe_status(-code) if code < 0 else f"exited with status {code}"


# -- a function's way to the worker ------------------------------------------------------------------------


def _submit(pool: Pool, carried: Any, call: tuple[Any, ...]) -> Future[Any]:
    """Submit the call. A function of a test's own module travels by value, where it can: its worker need not import
    the module then, pytest with it, and would not find it under every import mode."""
    with _by_value(carried) as by_value:
        future = pool.submit(serve, *call)
    if by_value and future.done() and isinstance(future.exception(), NotPicklable):
        future = pool.submit(serve, *call)
    if future.done() and isinstance(error := future.exception(), NotPicklable):
        if isinstance(carried, FunctionType):
            raise error
        raise NotPicklable(
            f"{error}; serve() also takes an application's name, 'module:attribute'"
        ) from error
    return future


@contextmanager
def _by_value(carried: Any) -> Iterator[bool]:
    import cloudpickle

    module = sys.modules.get(getattr(carried, "__module__", None) or "")
    if (
        module is None
        or not is_of_tests(module)
        or module.__name__ in cloudpickle.list_registry_pickle_by_value()
    ):
        yield False
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield True
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def pickled_for_others(obj: Any) -> bytes:
    """The pickle of an order for a fresh interpreter, as the second of two; the first has test modules found there.
    What it has of these travels by value, where it can.

    Raises:
        NotPicklable: it cannot travel at all.
    """
    import cloudpickle

    carried = next(iter(obj.args), None)
    with _by_value(carried) as by_value, suppress(Exception):
        if by_value:
            return bytes(cloudpickle.dumps((None, obj)))
    try:
        return bytes(cloudpickle.dumps((finder_for_others(), obj)))
    except Exception as error:
        raise NotPicklable(f"{carried!r} cannot travel to a process that keeps it: {error}") from error
