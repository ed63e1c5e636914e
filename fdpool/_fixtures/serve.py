"""`serve`: starts servers of a test in workers, on listeners that are bound already, and ends them with the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from .._clock import CLOCK
from .._options import check_seconds
from .._server.apps import Interface as AppInterface
from ..fds import HasFileno
from ..pool import Pool
from . import apps
from .listener import Kind, Listener
from .runs import FIRST_LISTENER, FunctionRun, ProgramRun, Run
from .served import READY_S, IsReady, Served

Interface = Union[AppInterface, Literal["function"]]


class Serve:
    """Starts servers, and ends them all; the fixture `serve` is one.

    Args:
        pool: each server has a worker of it, which serves nothing else.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._owner = os.getpid()
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
        """Serve a function or an application in a worker. A client may connect at once. Environment, working directory
        and `sys.path` are those of the test.

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
        self._check(ready_timeout)
        if not callable(app) and not isinstance(app, str):
            raise TypeError(
                f"serve() takes a function or an application, not {app!r}; serve.command() takes a program"
            )
        found = apps.kind_of(app, interface, len(args))
        if found == "function" and options:
            raise TypeError(
                f"{', '.join(options)}: a function that is given the listening socket has no options of a server"
            )
        if found != "function" and args:
            raise TypeError(f"{app!r} is served as {found}, and not called with arguments such as {args!r}")
        chosen = self._listener(listener, kind)
        given = (app, *args) if found == "function" else (apps.serve_app, app, found, options)

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
            env: its whole environment; None for this process's, as it is now.
            cwd: its working directory; None for this process's, as it is now.
            ready: called with the handle again and again until it returns something true.

        Raises:
            TypeError, ValueError, DescriptorRefused: as `Pool.popen`.
            ServerDied: it could not be started, ended before it was ready, or took too long.
        """
        self._check(ready_timeout)
        if isinstance(argv, (str, bytes)):
            raise TypeError(f"serve.command() takes a list of arguments, not the string {argv!r}")
        if not argv:
            raise ValueError("serve.command() takes a program and its arguments, and this list is empty")
        if fds is not None and not isinstance(fds, Mapping):
            raise TypeError(
                f"fds= maps numbers in the program to descriptors here, such as {{3: listener}}, not {fds!r}"
            )
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

    def _check(self, ready_timeout: float) -> None:
        check_seconds("ready_timeout", ready_timeout, zero=True)
        if os.getpid() != self._owner:
            raise RuntimeError(
                "serve cannot start a server here: this is an isolated test, a fork of the process that has the "
                "workers. Start it in a fixture, which is set up there"
            )

    def _listener(self, given: Listener | None, kind: Kind) -> Listener:
        if given is None:
            given = Listener.open(kind)
            self._listeners.append(given)
        elif not isinstance(given, Listener):
            raise TypeError(f"listener= takes what the fixture listener_factory makes, not {given!r}")
        elif given.fileno() < 0:
            raise ValueError(f"nothing can be served on {given!r}")
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
            patience_s: how long to wait for the first that fails, as long as any runs.
        """
        deadline = CLOCK.monotonic() + patience_s
        while not any(served.died for served in self._served):
            if CLOCK.monotonic() >= deadline or not any(served.running for served in self._served):
                break
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
