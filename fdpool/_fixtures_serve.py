"""`serve`: starts servers of a test in workers, on listeners that are bound already, and ends them with the test."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Literal, NoReturn, Union

from . import _fixtures_apps, _platform
from ._fixtures_errors import ServerDied
from ._fixtures_listener import Kind, Listener
from ._fixtures_runs import FIRST_LISTENER, FunctionRun, ProgramRun, Run
from ._server_apps import Interface as AppInterface
from .fds import HasFileno
from .pool import Pool

READY_S = 10.0
GRACE_S = 5.0
_LAST_GRACE_S = 2.0

# A server that is sent one of these is meant to end.
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGABRT}

Interface = Union[AppInterface, Literal["function"]]
IsReady = Callable[["Served"], object]


class Served:
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
    def url(self) -> str:
        """As `Listener.url`."""
        return self.listener.url

    @property
    def address(self) -> Any:
        """As `Listener.address`."""
        return self.listener.address

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
        """Send it a signal. If it ends by that, it has not died by itself. Does not wait: `wait` does."""
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
        deadline = time.monotonic() + ready_timeout
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
            if not self.running or time.monotonic() > deadline:
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
        poll = select.poll()
        poll.register(run.link_fd(), select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        if run.said_ready():
            return True
    except (EOFError, OSError):
        pass
    run.future.exception()  # it has let go of the link: how it ended comes in a moment
    return False


class Serve:
    """Starts servers, and ends them all; the fixture `serve` is one.

    Args:
        pool: each server has a worker of it, which serves nothing else.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._served: list[Served] = []
        self._listeners: list[Listener] = []

    def __call__(
        self,
        app: Any,
        *args: Any,
        listener: Listener | None = None,
        kind: Kind = "tcp",
        interface: Interface | None = None,
        ready_timeout: float = READY_S,
        **options: Any,
    ) -> Served:
        """Serve a function or an application in a worker. A client may connect at once.

        Args:
            app: a function, called with the listening socket and `args`, a coroutine function by asyncio; one that
                has a parameter called `ready` is given a function to call, and this returns only then. Or an
                application as `fdpool.Server` takes it: `handler(connection, address)`, a socketserver handler class,
                an ASGI or WSGI application, or its name, "module:attribute".
            listener: where to serve; by default a fresh one of `kind`.
            interface: which of these it is, where that cannot be told: "function", or as for `Server`.
            ready_timeout: seconds to become ready.
            options: any arguments of `Server`, such as `workers`: then it serves the application, in the worker.

        Raises:
            TypeError, ValueError: it cannot be told how to serve `app`, or it is no function and has `args`.
            NotPicklable, DescriptorRefused: it cannot travel to a worker, or its arguments cannot.
            ServerDied: it ended before it was ready, or took too long.
        """
        if not callable(app) and not isinstance(app, str):
            raise TypeError(
                f"serve() takes a function or an application, not {app!r}; serve.command() takes a program"
            )
        found = _fixtures_apps.kind_of(app, interface, len(args))
        if found == "function" and options:
            raise TypeError(
                f"{', '.join(options)}: a function that is given the listening socket has no options of a server"
            )
        if found != "function" and args:
            raise TypeError(f"{app!r} is served as {found}, and not called with arguments such as {args!r}")
        chosen = self._listener(listener, kind)
        given = (app, *args) if found == "function" else (_fixtures_apps.serve_app, app, found, options)

        def start(log_fd: int) -> Run:
            return FunctionRun(self._pool, given[0], chosen.socket, given[1:], log_fd, carried=app)

        name = app if isinstance(app, str) else getattr(app, "__name__", None) or repr(app)
        return self._begin(name, chosen, start, None, ready_timeout)

    def command(
        self,
        argv: Sequence[str],
        *,
        listener: Listener | None = None,
        kind: Kind = "tcp",
        fds: Mapping[int, int | HasFileno] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        ready: IsReady | None = None,
        ready_timeout: float = READY_S,
    ) -> Served:
        """Run a program that serves.

        It inherits the listener as descriptor 3, with LISTEN_FDS and LISTEN_PID as systemd sets them. In its arguments
        `{port}`, `{host}`, `{url}` and `{path}` are those of the listener.

        A program that can only bind a port for itself takes `{port}` with `fds={}`: the port is kept for it, and this
        returns when it listens there.

        Args:
            listener: where it serves; by default the first listener in `fds`, or else a fresh one of `kind`.
            fds: number in the program -> descriptor here, if it is not to be the listener as 3.
            env: its whole environment; None for this process's.
            ready: called with the handle again and again until it returns something true.

        Raises:
            TypeError, ValueError, DescriptorRefused: as `Pool.popen`.
            ServerDied: it could not be started, ended before it was ready, or took too long.
        """
        if isinstance(argv, (str, bytes)):
            raise TypeError(f"serve.command() takes a list of arguments, not the string {argv!r}")
        if listener is None and fds:
            listener = next((each for each in fds.values() if isinstance(each, Listener)), None)
        if fds == {} and listener is None:
            chosen = Listener.reserve(kind)
            self._listeners.append(chosen)
            ready = ready or _listens
        else:
            chosen = self._listener(listener, kind)
        handed = {FIRST_LISTENER: chosen} if fds is None else dict(fds)
        arguments = [_filled(str(argument), chosen) for argument in argv]

        def start(log_fd: int) -> Run:
            return ProgramRun(self._pool, arguments, handed, log_fd, env, cwd)

        return self._begin(" ".join(arguments), chosen, start, ready, ready_timeout)

    def _listener(self, given: Listener | None, kind: Kind) -> Listener:
        if given is None:
            given = Listener.open(kind)
            self._listeners.append(given)
        elif not isinstance(given, Listener):
            raise TypeError(f"listener= takes what the fixture listener_factory makes, not {given!r}")
        return given

    def _begin(
        self,
        name: str,
        listener: Listener,
        start: Callable[[int], Run],
        ready: IsReady | None,
        ready_timeout: float,
    ) -> Served:
        served = Served(name, listener, start)
        self._served.append(served)
        served.begin(ready, ready_timeout)
        return served

    # -- for the plugin -------------------------------------------------------------------------------------

    def died(self, patience_s: float = 0.0) -> list[Served]:
        """The servers that have failed by themselves, without the test having been told.

        Args:
            patience_s: how long to wait for the first that fails; a client sees that earlier than we.
        """
        deadline = time.monotonic() + patience_s
        while not any(served.died for served in self._served) and time.monotonic() < deadline:
            time.sleep(0.002)
        return [served for served in self._served if served.died]

    def logs(self) -> Iterable[tuple[str, str]]:
        """What became of each server, and its log; but for those that run and have written nothing."""
        return [
            (served.end_in_words(), served.logs)
            for served in self._served
            if served.logs or not served.running
        ]

    def close(self) -> None:
        """Stop every server, the last one first, and close the listeners made here."""
        while self._served:
            self._served.pop().close()
        while self._listeners:
            self._listeners.pop().close()


def _listens(served: Served) -> bool:
    try:
        served.listener.connect(1.0).close()
    except OSError:
        return False
    return True


def _filled(argument: str, listener: Listener) -> str:
    for name in ("port", "host", "url", "path"):
        if f"{{{name}}}" in argument:
            argument = argument.replace(f"{{{name}}}", str(getattr(listener, name)))
    return argument
