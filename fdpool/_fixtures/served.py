"""`Served`: the handle of a server that runs in a worker: where it is, its log, its readiness and its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NoReturn

from .. import _platform
from .._clock import CLOCK
from ..fds import is_readable
from .errors import ServerDied
from .listener import Listener, Reachable
from .runs import FunctionRun, Run

READY_S = 10.0
GRACE_S = 5.0
_LAST_GRACE_S = 2.0

# A server that is sent one of these is meant to end.
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGABRT}

IsReady = Callable[["Served"], object]


class Served(Reachable):
    """A server that runs in a worker, or has run there.

    Attributes:
        name: what errors call it.
        listener: the socket that it serves on. It stays bound when the server is stopped or killed: clients wait in it
            for `restart()`. They are turned away if the server has ended by itself.

    For one thread at a time.
    """

    def __init__(self, name: str, listener: Listener, start: Callable[[int], Run]) -> None:
        self.name = name
        self.listener = listener
        self._start = start
        self._owner = os.getpid()
        self._log_fd = _platform.anonymous_file("fdpool-log")
        self._run: Run | None = None
        self._lock = threading.Lock()  # held while the run changes, or clients are turned away for its sake
        self._sent: set[int] = set()
        self._seen = False  # the test has been told of the death

    # -- where it is --------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Process id of its worker, or of its program.

        Raises:
            ServerDied: it was not running any more.
        """
        try:
            if self._run is not None:
                return self._run.pid
        except (EOFError, OSError, CancelledError):
            pass
        raise ServerDied(self.end_in_words(), self.logs)

    @property
    def logs(self) -> str:
        """What it, and what it has started, wrote to standard output and error so far; also before a restart."""
        if self._log_fd < 0:
            return self._last_logs
        size = os.fstat(self._log_fd).st_size
        return os.pread(self._log_fd, size, 0).decode(errors="backslashreplace")

    @property
    def log_fd(self) -> int:
        """Descriptor of the file that its log is; the handle's own."""
        return self._log_fd

    @property
    def running(self) -> bool:
        """True until it ends, for whatever reason."""
        return self._run is not None and not self._run.future.done()

    @property
    def died(self) -> bool:
        """True if it has failed: ended otherwise than by returning, by this handle, or noticed by `wait`."""
        run = self._run
        if run is None or not run.future.done() or self._seen:
            return False
        return not self._is_expected(run) and not run.is_success()

    def end_in_words(self) -> str:
        """What became of it."""
        if self.running:
            return f"the server {self.name} is running"
        if self._run is None or self._run.future.cancelled():
            return f"the server {self.name} was stopped"
        return f"the server {self.name} {self._run.describe_end()}"

    # -- what is done to it ---------------------------------------------------------------------------------

    def stop(self, grace: float = GRACE_S) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds; returns when its process is gone. Safe to call again.

        Raises:
            ServerDied: it had ended by itself before.
        """
        error = ServerDied(self.end_in_words(), self.logs) if self.died else None
        self._end(grace)
        if error is not None:
            raise error

    def restart(self, grace: float = GRACE_S, ready_timeout: float = READY_S) -> None:
        """Stop it, if it runs, and start it anew on the same listener; clients who come meanwhile wait there.

        Raises:
            ServerDied: it had ended by itself, or does not become ready.
        """
        self.stop(grace)
        self.begin(self._is_ready, ready_timeout)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal. If it ends by that, it has not died by itself. Does not wait: `wait` does.

        Raises:
            TypeError, ValueError: there is no such signal.
        """
        if not isinstance(number, int):
            raise TypeError(f"kill() takes a signal's number such as signal.SIGTERM, not {number!r}")
        if number not in signal.valid_signals():
            raise ValueError(f"there is no signal {number}")
        if self._run is not None:
            self._sent.add(int(number))
            self._run.signal(number)

    def wait(self, timeout: float = 10.0) -> str:
        """Wait until it ends, in whatever way, which is then no failure of the test; says how.

        Raises:
            TimeoutError: it runs on.
        """
        if self._run is not None:
            try:
                self._run.future.exception(timeout)
            except CancelledError:
                pass
            except FutureTimeoutError:
                raise TimeoutError(f"{self.end_in_words()}, and has been for {timeout:g} s") from None
        self._seen = True
        return self.end_in_words()

    # -- for `Serve` ------------------------------------------------------------------------------------------

    def begin(self, is_ready: IsReady | None, ready_timeout: float) -> None:
        """Start it, and wait until it is ready, if it is to say so.

        Raises:
            ServerDied: it ended before, or took longer than `ready_timeout` seconds; it is stopped.
        """
        self._is_ready = is_ready
        self._sent = set()
        self._seen = False
        self.listener.revive()
        run = self._run = self._start(self._log_fd)
        run.future.add_done_callback(lambda _: self._on_end(run))
        deadline = CLOCK.monotonic() + ready_timeout
        try:
            if isinstance(run, FunctionRun) and run.tells_ready:
                ready = _await_word(run, deadline)
            else:
                ready = is_ready is None or self._await_true(is_ready, deadline)
            if not ready:
                self._raise_not_ready(ready_timeout)
        except BaseException:
            self._end(0.0)
            raise

    def close(self) -> None:
        """Stop it, and forget its log's file."""
        if self._log_fd >= 0:
            self._end(_LAST_GRACE_S)
            self._last_logs = self.logs
            os.close(self._log_fd)
            self._log_fd = -1

    def _raise_not_ready(self, ready_timeout: float) -> NoReturn:
        if self.running:
            what = f"the server {self.name} was not ready within {ready_timeout:g} s"
        else:
            what = f"{self.end_in_words()} before it was ready"
        self._seen = True
        raise ServerDied(what, self.logs)

    def _await_true(self, is_ready: IsReady, deadline: float) -> bool:
        pause_s = 0.001
        while not is_ready(self):
            if not self.running or CLOCK.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return True

    def _end(self, grace_s: float) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"the server {self.name} belongs to process {self._owner}, and this is a fork of that"
            )
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            self._sent.add(signal.SIGTERM)
            run.end(grace_s)

    def _on_end(self, run: Run) -> None:
        """Runs in: the pool's pump. Nobody is to wait for a server that will not come."""
        with self._lock:
            if run is self._run and not self._is_expected(run):
                self.listener.refuse()

    def _is_expected(self, run: Run) -> bool:
        return bool(self._sent & _ENDING) or run.future.cancelled() or run.killed_by() in self._sent

    def __repr__(self) -> str:
        return f"<Served {self.name} at {self.url} {'running' if self.running else 'ended'}>"


def _await_word(run: FunctionRun, deadline: float) -> bool:
    try:
        if not is_readable(run.link_fd(), max(0.0, deadline - CLOCK.monotonic())):
            return False
        if run.said_ready():
            return True
    except (EOFError, OSError):
        pass
    run.future.exception()  # it has let go of the link: how it ended comes in a moment
    return False
