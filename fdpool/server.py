"""`Server`: a pre-forking server, whose workers are replaced one by one without losing a request.

It is a client of `Pool`, and nothing here forks, reaps or kills: each server worker is one long task of a pool
(`_server.worker`), and each generation of code is a pool of its own. What to start, drain and give up is decided by
`_server.plan`; `_server.loop` performs it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from . import _bind, _systemd, payload
from ._clock import CLOCK
from ._cpus import usable_cpus
from ._server import apps, checks, travel, upgrade
from ._server.context import Order, ServerWorker, current_worker
from ._server.crew import Task
from ._server.listeners import Listeners, keys_of
from ._server.loop import Loop
from ._server.plan import Plan, Settings
from ._server.pools import Pools
from ._server.watch import Watch, resident_bytes
from .errors import BindFailed, ForkedPool

if TYPE_CHECKING:
    import socket

    from ._server.signals import Signals
    from .pool import StartMethod

__all__ = ["Server", "ServerStats", "ServerWorker", "WorkerStats", "current_worker"]

Dispatch = Literal["shared", "handoff", "reuseport"]
_LOG = logging.getLogger("fdpool.server")

WorkerHook = Callable[[ServerWorker], object]


class WorkerStats(NamedTuple):
    """One worker of a server, at a moment.

    Attributes:
        slot, generation: its place, and the code that it runs.
        pid: None while it boots.
        state: "booting", "standing by", "serving", "draining" or "ending".
        age_s: since it was started.
        requests: finished ones; connections, where the application is called with those.
        in_flight: begun ones.
        oldest_s: how long the oldest of those has not moved on; 0 if none is in flight.
        rss_bytes: its resident memory.
    """

    slot: int
    generation: int
    pid: int | None
    state: str
    age_s: float
    requests: int
    in_flight: int
    oldest_s: float
    rss_bytes: int | None


class ServerStats(NamedTuple):
    """A server, at a moment.

    Attributes:
        addresses: where it listens.
        wanted: how many workers shall serve.
        generation: the one that serves.
        started: workers started so far.
        workers: those that are there, by slot.
    """

    addresses: tuple[str, ...]
    wanted: int
    generation: int
    started: int
    workers: tuple[WorkerStats, ...]


class Server:
    """A pre-forking server: `workers` processes that accept from the same listeners.

    `run()` serves until a signal ends it. `with server:` (and `async with`) serves meanwhile, in any thread and without
    touching signals. A worker that dies is replaced; the connections that nobody has accepted wait for the others.

    Args:
        app: what serves. A function `handler(connection, address)`; a `socketserver.BaseRequestHandler` class; an ASGI
            application (needs `fdpool[asgi]`) or a WSGI one (`fdpool[wsgi]`); a function `serve(listeners)` or
            `serve(listeners, worker)` that accepts for itself. Or its name, "module:attribute", or
            "module:factory()": only so does a reload bring new code. An object that cannot be pickled is imported by
            the workers, under the name that it has in its module, or in the program's script.
        bind: where to listen. One or several of "host:port", a number (that port of 127.0.0.1), "unix:path?mode=660",
            "fd:N", "systemd", "systemd:name", and listening sockets (borrowed).
        workers: how many, 512 at most; by default as many as processors may be used.
        standby: so many more stand by: their application is loaded, and they serve as soon as one that serves is lost.
            Not with "reuseport".
        interface: which kind of application it is, where that cannot be told: "handler", "socketserver", "asgi",
            "wsgi" or "listeners".
        dispatch: who accepts. "shared": whichever worker is first. "handoff": this process, and it hands each
            connection to the least busy worker; one whose worker dies before it has taken it goes to the next.
            "reuseport": each worker from a listener of its own, between which the kernel spreads connections.
        threads: connections that a worker serves at a time, by default one; for WSGI requests, by default four. One at
            a time is served in the worker's main thread, without a hand-over to another. Not for ASGI.
        grace: seconds that requests in flight have when their worker is replaced, or the server ends.
        boot_timeout: seconds that a worker may take until it serves.
        request_timeout: seconds that a request may go without moving on; then its worker is killed, and where it was is
            logged. For ASGI the time that the event loop may stand still; a request that waits so long is cancelled.
        max_requests, max_age, max_memory: requests, seconds and bytes of resident memory after which a worker is
            replaced; the first two spread by `jitter`.
        jitter: by which fraction those may differ from worker to worker.
        reload_batch: how many workers are replaced at a time.
        boot_limit: failed attempts in a row to boot workers (those that boot together are one) after which the server
            gives up, if no worker serves.
        preload: modules to import once, before workers are forked, so that they share that memory; True for the
            module of `app`.
        start_method: as for `Pool`.
        backlog: connections that the kernel keeps waiting.
        options: more arguments for what speaks HTTP: `uvicorn.Config`, waitress's `Adjustments`.
        on_ready: called here, in the server's thread, once as many workers serve as are wanted. A successor calls it
            before the process that it replaces is told; if it raises there, that one goes on, and the successor ends.
        on_worker_start: called with the `ServerWorker`, in the worker, before the application is loaded; also in one
            that stands by.
        on_worker_exit: the same when it has drained.
        on_reload: called with the new generation's number, here, before a reload begins; if it raises, there is none.

    Raises:
        ValueError, TypeError: an argument is of no use.
        NotPicklable: the application cannot travel to a worker, and has no name, or a hook cannot travel.
        ImportError: what speaks HTTP is not installed. (Of a named application without `interface` the workers find
            that out: they fail to boot.)

    Nothing is opened or started before `run`, `start` or `with`. A server serves once. Thread-safe. In a forked child
    of this process `stop` does nothing, orders raise `ForkedPool`, and the parent's server is left alone.
    """

    def __init__(
        self,
        app: Any,
        bind: _bind.Bind = "127.0.0.1:8000",
        *,
        workers: int | None = None,
        standby: int = 0,
        interface: apps.Interface | None = None,
        dispatch: Dispatch = "shared",
        threads: int | None = None,
        grace: float = 30.0,
        boot_timeout: float = 60.0,
        request_timeout: float | None = None,
        max_requests: int | None = None,
        max_age: float | None = None,
        max_memory: int | None = None,
        jitter: float = 0.1,
        reload_batch: int = 1,
        boot_limit: int = 5,
        preload: bool | Iterable[str] = (),
        start_method: "StartMethod | None" = None,
        backlog: int = _bind.BACKLOG,
        options: Mapping[str, Any] | None = None,
        on_ready: Callable[[], object] | None = None,
        on_worker_start: WorkerHook | None = None,
        on_worker_exit: WorkerHook | None = None,
        on_reload: Callable[[int], object] | None = None,
    ) -> None:
        workers = usable_cpus() if workers is None else workers
        checks.check_counts(
            workers=workers,
            reload_batch=reload_batch,
            boot_limit=boot_limit,
            backlog=backlog,
        )
        checks.check_standby(standby, dispatch)
        checks.check_counts(optional=True, threads=threads, max_requests=max_requests, max_memory=max_memory)
        checks.check_times(grace=grace, boot_timeout=boot_timeout)
        checks.check_times(optional=True, request_timeout=request_timeout, max_age=max_age)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is a fraction, at least 0 and below 1, not {jitter!r}")
        if dispatch not in get_args(Dispatch):
            raise ValueError(f"dispatch is one of {', '.join(get_args(Dispatch))}, not {dispatch!r}")
        self.interface = checks.checked_interface(app, interface, dispatch)
        target = app if isinstance(app, str) else travel.target_of(app)
        self._bind = bind
        self._backlog = backlog
        self._dispatch = dispatch
        self._grace_s = grace
        self._watch_for = (request_timeout, max_memory)
        self._preload = checks.modules_to_preload(preload, target)
        self._start_method = start_method
        self._settings = Settings(boot_timeout, grace, reload_batch, boot_limit, max_age, jitter, standby)
        self._workers = workers
        self._order = Order(
            0,
            1,
            target,
            b"",
            False,
            self.interface,
            threads,
            max_requests,
            request_timeout,
            backlog,
            dict(options or {}),
        )
        self._pickled = (None if target else app, on_worker_start, on_worker_exit)
        payload.dumps(
            self._pickled
        ).close()  # what cannot travel is to be known here, and not by a worker's failure
        self._on_ready = on_ready
        self._on_reload = on_reload
        self._loop: Loop | None = None
        self._given_up = False  # for who comes to start it, perhaps when there was no loop yet to stop
        self._listeners: Listeners | None = None
        self._lock = threading.Lock()

    # -- beginning and end ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the listeners and start the workers; returns when all serve.

        Raises:
            BindFailed: it cannot be listened somewhere.
            ServerFailed: no worker can be booted, or there are too few descriptors for so many. Nothing is left.
            RuntimeError: it was started before; or a module starts it as it is imported, which its workers do, too.
        """
        loop = self._launch(lambda _: None)
        try:
            if self._given_up:
                loop.stop(0.0)
            loop.started.result()
        except BaseException:
            loop.stop(0.0)
            loop.wait()
            raise

    def run(self) -> int:
        """Serve until a signal ends it; the exit code for whoever started this program: 0, 3 if it gave up, 70 after a
        defect of its own.

        SIGTERM ends it within `grace`; SIGINT and SIGQUIT give what is in flight one second, and none the second time.
        SIGHUP reloads, SIGTTIN and SIGTTOU have one worker more or less, SIGUSR1 opens log files anew. SIGUSR2 has a
        new process of this program take over the listeners, and this one ends when that serves.

        Raises:
            RuntimeError: this is not the main thread, which alone receives signals; there, use `with server:`.
            BindFailed, ServerFailed: as for `start`, except that a failed boot is told by the exit code.
        """
        from ._server.signals import Signals

        with Signals() as signals:
            return self._run_under(signals)

    def _run_under(self, signals: "Signals") -> int:
        """`run`, for who has signals handled already: what comes before the loop is there is done then."""
        # The program waits in here, so no other server of it can still come for what is handed on.
        loop = self._launch(signals.hear, takes_any=True)
        signals.begin(loop)
        signals.wait()
        return loop.exit_code

    def _launch(self, on_event: Callable[[str], None], takes_any: bool = False) -> Loop:
        worker = current_worker()
        checks.check_not_imported(self._order.target, worker is not None and not worker.is_ready)
        with self._lock:
            if self._loop is not None:
                raise RuntimeError("this server was started before; make a new one")
            checks.check_descriptors(self._workers + self._settings.standby, self._dispatch)
            predecessor = upgrade.take(None if takes_any else keys_of(self._bind))
            try:
                listeners = self._listeners = Listeners(
                    self._bind,
                    self._backlog,
                    self._dispatch == "reuseport",
                    self._workers,
                    *((predecessor.listeners, predecessor.served) if predecessor is not None else ()),
                )
            finally:
                if predecessor is not None:
                    predecessor.close_listeners()
            if takes_any:
                # This process is a server from here on. What systemd has passed, and no bind asks for, is none of its
                # children's; nor its trouble, if that cannot be served.
                with contextlib.suppress(BindFailed):
                    _systemd.passed_sockets()

            def tell(event: str) -> None:
                on_event(event)
                if event == "started":
                    is_ready = self._say_ready()
                    if predecessor is not None and is_ready:
                        listeners.take_over()
                        predecessor.tell_ready(listeners.served)
                    elif predecessor is not None and self._loop is not None:
                        predecessor.abandon()
                        self._loop.give_up("on_ready failed, so the server that was to be replaced goes on")
                elif event == "ended" and predecessor is not None:
                    predecessor.abandon()

            try:
                app = payload.dumps(self._pickled)
                order = self._order._replace(body=bytes(app.body), spilled=app.spilled)
                serves = self.interface
                if serves is None and order.target is not None:
                    from ._server import guess  # `ast` comes with it, 4 ms

                    serves = guess.interface_of(order.target)
                preload = [*checks.modules_to_look_closer(self.interface), *self._preload]
                self._loop = Loop(
                    Task(app, order, self._on_reload),
                    Plan(self._workers, self._settings),
                    Pools(serves, preload, self._start_method),
                    listeners,
                    Watch(*self._watch_for),
                    self._dispatch,
                    tell,
                )
                self._loop.start()
            except BaseException:
                listeners.close()
                raise
            return self._loop

    def _say_ready(self) -> bool:
        """Call `on_ready`; False if that has failed."""
        if self._on_ready is not None:
            try:
                self._on_ready()
            except (Exception, SystemExit):
                _LOG.exception("on_ready failed", extra={"event": "hook_failed"})
                return False
        return True

    def stop(self, grace: float | None = None, *, wait: bool = True) -> None:
        """End the server. Safe to call again, and a second time with less grace.

        Args:
            grace: seconds that requests in flight have; by default the server's. 0 ends everything at once.
            wait: return when nothing of it is left.
        """
        if self._loop is None:
            return
        self._loop.stop(self._grace_s if grace is None else max(0.0, grace))
        if wait:
            self._loop.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has ended; False if `timeout` seconds have passed instead."""
        return self._loop is None or self._loop.wait(timeout)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        """End the server within its grace; if Ctrl-C has ended the block, at once."""
        self.stop(0.0 if kind is not None and issubclass(kind, KeyboardInterrupt) else None)

    async def __aenter__(self) -> "Server":
        import asyncio  # whoever comes here has it; the process of `run` need not, nor the 5 MiB

        run_in_thread = partial(asyncio.get_running_loop().run_in_executor, None)
        starting = run_in_thread(self.start)
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The block is never entered, so nobody else would end it.
            self._given_up = True
            self.stop(0.0, wait=False)
            await asyncio.gather(starting, run_in_thread(self.wait), return_exceptions=True)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import asyncio

        grace = 0.0 if kind is not None and not issubclass(kind, Exception) else None
        await asyncio.get_running_loop().run_in_executor(None, partial(self.stop, grace))

    # -- while it serves -----------------------------------------------------------------------------------

    def reload(self) -> Future[int]:
        """Replace every worker by one with new code, `reload_batch` at a time; no request is lost.

        Returns:
            the future of the new generation's number, once every worker is of it. It fails with `ReloadFailed` if the
            new code does not boot: then what served before goes on. If another reload comes before this one is done,
            the other's outcome is also this one's. It cannot be cancelled.
        """
        return self._running().reload()

    def scale(self, workers: int) -> None:
        """Have so many workers from now on; those that are too many drain. Does not wait.

        Raises:
            ValueError: less than one.
            ServerFailed: this process may not have as many descriptors as so many workers take.
        """
        checks.check_counts(workers=workers)
        checks.check_descriptors(workers + self._settings.standby, self._dispatch)
        self._running().scale(lambda _: workers)

    def upgrade(self) -> None:
        """Have a new process take the place of this one, by the command that started this: new code of everything, even
        a new Python. It takes over the listeners; when its workers serve, this server drains and ends. If it
        fails, or does not serve in time, this one goes on. Refused, and logged, where this process is process 1: its
        end would be the successor's. Does not wait."""
        self._running().upgrade()

    def reopen_logs(self) -> None:
        """Have the files of `logging` opened anew, here and in every worker, after they were moved away."""
        self._running().reopen_logs()

    @property
    def sockets(self) -> "list[socket.socket]":
        """The listening sockets, one for each address; the server's.

        Raises:
            RuntimeError: it was not started.
        """
        return [listener.socket for listener in self._opened().first]

    @property
    def addresses(self) -> list[str]:
        """Where it listens, as `tcp://127.0.0.1:8000` or `unix:/run/x.sock`.

        Raises:
            RuntimeError: it was not started.
        """
        return [listener.address for listener in self._opened().first]

    def stats(self) -> ServerStats:
        """What the server and its workers are doing just now."""
        loop = self._running()
        now = CLOCK.monotonic()
        workers = []
        for link in sorted(loop.crew.links.copy().values(), key=lambda each: (each.slot, each.number)):
            if link.lost:
                continue
            try:
                seen = link.see()
            except ValueError:
                continue  # it has gone this moment
            workers.append(
                WorkerStats(
                    link.slot,
                    link.generation,
                    link.pid,
                    loop.state_of(link.number),
                    now - link.began_at,
                    seen.finished,
                    seen.in_flight,
                    0.0 if seen.oldest is None else max(0.0, now - seen.oldest),
                    resident_bytes(link.pid),
                )
            )
        return ServerStats(
            tuple(self.addresses), loop.wanted, loop.generation, loop.crew.started, tuple(workers)
        )

    def _running(self) -> Loop:
        if self._loop is None:
            raise RuntimeError("the server was not started: use run(), start() or `with server:`")
        if self._loop.is_forked:
            raise ForkedPool(
                "this server belongs to the process that made it, and this is a forked child of that: "
                "make a new Server here"
            )
        return self._loop

    def _opened(self) -> Listeners:
        if self._listeners is None:
            raise RuntimeError("the server was not started, so it does not listen yet")
        return self._listeners
