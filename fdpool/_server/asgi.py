"""Serving an ASGI application with uvicorn, in a server worker's event loop.

What is ours: when to stop accepting, what becomes of connections that are kept alive meanwhile, and telling how far
requests are. What speaks HTTP and WebSocket is uvicorn.

Draining without a reset: the listeners are closed (other workers have them too), each answer from then on carries
`Connection: close`, and connections on which nothing happens are closed only after uvicorn's own keep-alive time, as
a client may be sending on one right now; so are those whose TLS handshake is not over by then. When the whole server
ends, both are closed at once. WebSockets are closed at once with code 1012, "service restart".
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - the loop's executor: the same
import contextlib
import importlib
import inspect
import logging
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import uvicorn
from uvicorn.middleware import proxy_headers

from .._clock import CLOCK
from .._log import log
from .by_loop import ByLoop, accepts_well
from .context import Order, ServerWorker
from .courtesy import Courtesy
from .doors import Door, Listening
from .intake import Connections, Intake
from .pace import Weight
from .progress import BEGUN, FINISHED

# uvicorn imports these, and what they stand for (httptools, websockets, uvloop), as it first needs them: in each worker
# again, unless this module was imported in the supervisor.
for _name in (
    "lifespan.on",
    "loops.auto",
    "loops.asyncio",
    "loops.uvloop",
    "protocols.http.auto",
    "protocols.websockets.auto",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"uvicorn.{_name}")

_NOT_HERE = {
    **dict.fromkeys(("host", "port", "uds", "fd"), "where it listens is said by bind (--bind)"),
    "workers": "how many there are is said by workers (--workers)",
    **dict.fromkeys(("reload", "reload_dirs"), "files are watched by fdpool serve --reload-on-change"),
}

Message = MutableMapping[str, Any]
Application = Callable[[Any, Any, Any], Awaitable[None]]

_LOGGER = "fdpool.server"
_BEAT_S = 0.2  # rarer than uvicorn's ticks, so that it wakes nobody up as long as there are those
_CLOSE = (b"connection", b"close")
_FORWARDED = frozenset([b"x-forwarded-for", b"x-forwarded-proto"])  # which uvicorn's middleware looks at


class AsgiFace:
    """uvicorn on the worker's listeners, or on connections that it is handed."""

    def __init__(
        self,
        app: Application,
        order: Order,
        worker: ServerWorker,
        door: Door,
        listeners: Sequence[socket.socket],
    ) -> None:
        self._app = _Watched(app, worker, order.request_timeout_s)
        options = {"log_config": None, "backlog": order.backlog, "interface": "asgi3", **order.options}
        _check_options(options)
        trusts = options.pop("proxy_headers", True)
        config = uvicorn.Config(self._app, **options, proxy_headers=False)
        if trusts:
            self._app.trust(config.forwarded_allow_ips)
        config.load()  # here, and not as it serves: a check comes no further, and is to find what it refuses
        if hasattr(config, "get_loop_factory"):  # since uvicorn 0.36; before, it was set at once
            config.get_loop_factory()
        self._server = _Server(config, self._app, worker, door, order.request_timeout_s)
        self._worker = worker
        self._sockets = list(listeners)

    def serve(self, ready: Callable[[], None]) -> None:
        self._server.on_started = ready
        try:
            self._server.run(sockets=self._sockets)
        except SystemExit:  # which uvicorn may raise where it does not start
            if self._server.started:
                raise
        finally:
            self._worker.progress.beats_no_more()
        if not self._server.started:
            raise RuntimeError(self._app.failure)

    def drain(self, grace_s: float, leaving: bool) -> None:
        self._server.drain(CLOCK.monotonic() + grace_s, leaving)

    def close(self) -> None:
        pass  # nothing is open before it serves


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that uvicorn would take, and that says nothing here; TypeError for a text where it
    takes a number, or true or false: it would use whatever it is."""
    for name in _NOT_HERE.keys() & options.keys():
        raise ValueError(f"option {name} is of no effect here: {_NOT_HERE[name]}")
    parameters = inspect.signature(uvicorn.Config).parameters
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(value, str) and isinstance(default, (bool, int, float)):
            wanted = "true or false" if isinstance(default, bool) else "a number"
            raise TypeError(f"option {name} is {wanted}, not {value!r}")


class _Server(uvicorn.Server):  # type: ignore[misc, unused-ignore]  # it may not be installed
    """uvicorn's server, with signals left to the worker, and a drain in place of its sudden end."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: _Watched,
        worker: ServerWorker,
        door: Door,
        request_timeout_s: float | None,
    ) -> None:
        super().__init__(config)
        self.on_started: Callable[[], None] = lambda: None
        self._app = app
        self._worker = worker
        self._door = door
        self._by_loop: ByLoop | None = None  # the loop itself accepts, and nothing comes by the door
        self._serving_loop: asyncio.AbstractEventLoop | None = None
        self._order: tuple[float, bool] | None = None  # a drain's end, and whether everybody leaves
        self._beat_s = min(_BEAT_S, (request_timeout_s or math.inf) / 4)
        self._next_beat: asyncio.TimerHandle | None = None
        self._connections = Connections()
        self._intake = Intake(door, worker.progress, self._connections, lambda: app.begun)
        self._weight = Weight()
        self._loop_may_accept = False  # it does while requests are quick
        self._is_shared = isinstance(door, Listening)
        self._has_all = False  # uvicorn knows every connection that was accepted before the drain
        self._idle_at = math.inf  # when idle connections are closed

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.connections = self._connections
        await super().startup(sockets=[])
        if self.should_exit or not self.started:
            return
        self._serving_loop = asyncio.get_running_loop()
        try:
            await self._begin_serving(self._serving_loop)
        except BaseException:
            # uvicorn does not; and uvloop, as it is closed, would wait for what is open, if warnings are errors.
            self._take_no_more(self._serving_loop)
            raise

    async def _begin_serving(self, loop: asyncio.AbstractEventLoop) -> None:
        os.register_at_fork(after_in_child=self._forget_in_child)
        _fix_log_level()
        self._beat()
        # With TLS nothing is known of what the loop has accepted until hands are shaken; no drain is to cut that off.
        self._loop_may_accept = self._is_shared and self.config.ssl is None and accepts_well(loop)
        by_loop = self._prepare_by_loop(loop) if self._loop_may_accept else None
        if by_loop is None:
            self._accept_by_intake()
        else:
            await by_loop.open()
        self.on_started()
        if self._order is not None:
            self._begin_draining()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Where uvicorn ends by itself (`limit_max_requests`) nobody has told us to drain. The door closes its own; and
        # what runs here may take long, in which somebody else is to accept.
        if not self._worker.draining:
            self._worker.retire("uvicorn ends by itself")
        self._take_no_more(asyncio.get_running_loop())
        await super().shutdown(sockets=[])

    def drain(self, until: float, leaving: bool) -> None:
        """Runs in: any thread."""
        self._order = (until, leaving)
        if self._serving_loop is not None:
            try:
                self._serving_loop.call_soon_threadsafe(self._begin_draining)
            except RuntimeError:
                pass  # the loop is closed: it has ended by itself

    def _begin_draining(self) -> None:
        assert self._order is not None
        _, leaving = self._order
        self._stop_accepting()
        self._mark_answers()
        for connection in list(self._connections):
            if leaving or not hasattr(connection, "timeout_keep_alive_task"):  # all but HTTP: WebSockets
                connection.shutdown()
        if self._idle_at == math.inf:
            self._idle_at = CLOCK.monotonic() + self.config.timeout_keep_alive

    def _stop_accepting(self) -> None:
        loop = self._serving_loop
        assert loop is not None
        self._take_no_more(loop)
        self._worker.closed()
        loop.call_soon(self._have_all)  # uvicorn hears of what uvloop has accepted in the next turn

    def _have_all(self) -> None:
        self._has_all = True
        assert self._order is not None
        _, leaving = self._order
        if leaving and self.config.ssl is not None:  # else they are uvicorn's in a moment
            self._intake.cut_off()

    def _mark_answers(self) -> None:
        """Have every answer that has not begun end its connection, and say so: uvicorn heeds that header."""
        if _CLOSE in self.config.encoded_headers:
            return
        self.config.encoded_headers.append(_CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        for connection in self._connections:
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_started:
                cycle.default_headers = [*cycle.default_headers, _CLOSE]

    def _beat(self) -> None:
        """The loop turns. Said in each of uvicorn's ticks, and so often as it ends, or where those are too rare."""
        assert self._serving_loop is not None
        self._worker.progress.beat()
        courtesy = (self._intake if self._by_loop is None else self._by_loop).courtesy
        if courtesy is not None:
            courtesy.beat()
        self._weigh_requests(self._serving_loop)
        if self._next_beat is not None:
            self._next_beat.cancel()
        self._next_beat = self._serving_loop.call_later(self._beat_s, self._beat)

    async def on_tick(self, counter: int) -> bool:
        self._beat()
        if self._by_loop is not None and counter % 10 == 0:  # once a second
            self._by_loop.look_soon()
        if self._order is not None:
            now = CLOCK.monotonic()
            until, _ = self._order
            drained = self._has_all and not (self._connections or self._intake)
            if drained or now >= until:
                self.config.timeout_graceful_shutdown = max(0.0, until - now)  # type: ignore[assignment, unused-ignore]
                self.should_exit = True
            elif now >= self._idle_at:
                self._idle_at = math.inf
                for connection in list(self._connections):
                    connection.shutdown()  # what is idle is closed; what runs is not kept alive
                self._intake.cut_off()
        return bool(await super().on_tick(counter))

    def _forget_in_child(self) -> None:
        """Runs in a child that a request has forked: it leaves as the request ends, and what it sends before is for
        nobody, as if its client had gone. (To look at each message costs each request 0.3 to 0.6 µs.)"""
        self._app.in_child = True
        for connection in self._connections:
            cycle = getattr(connection, "cycle", None)
            if cycle is not None:
                cycle.disconnected = True

    # -- where connections come from ----------------------------------------------------------------------

    def _weigh_requests(self, loop: asyncio.AbstractEventLoop) -> None:
        """Where they keep the loop for long, take each by itself: who waits meanwhile may be another worker's, and is
        nobody's loss if this one is killed."""
        is_long = self._weight.is_long(time.thread_time(), self._app.begun)
        if not self._is_shared or self._order is not None:
            return
        loop.call_soon(self._see_turn, loop)
        self._intake.one_by_one = is_long
        if is_long and self._by_loop is not None:
            self._by_loop.close()
            self._accept_by_intake()
        elif self._loop_may_accept and not is_long and self._by_loop is None:
            by_loop = self._prepare_by_loop(loop)
            if by_loop is not None:
                self._intake.rest()
                by_loop.go_on()

    def _see_turn(self, loop: asyncio.AbstractEventLoop, since: float = 0.0, begun: int = 0) -> None:
        """See how long the next turn takes, in which nobody waits for anything but requests."""
        now = loop.time()
        if since:
            self._weight.took(now - since, self._app.begun - begun)
        else:
            loop.call_soon(self._see_turn, loop, now, self._app.begun)

    def _prepare_by_loop(self, loop: asyncio.AbstractEventLoop) -> ByLoop | None:
        """What has the loop accept once it is opened; None if there are too few descriptors."""
        by_loop = ByLoop(
            loop,
            self._door.filenos(),
            self.config.backlog,
            self._make_protocol,
            self._connections,
            self._have_no_room,
        )
        if not by_loop.has_room():
            self._loop_may_accept = False
            return None
        self._by_loop = by_loop
        by_loop.courtesy = self._courtesy_of(
            loop, lambda: len(self._connections), by_loop.stop, by_loop.go_on
        )
        return by_loop

    def _have_no_room(self) -> None:
        """At the limit of descriptors, libuv accepts and closes."""
        self._loop_may_accept = False
        self._accept_by_intake()

    def _accept_by_intake(self) -> None:
        """Take connections by the door from now on."""
        loop = self._serving_loop
        assert loop is not None
        self._by_loop = None
        intake = self._intake
        intake.courtesy = self._courtesy_of(loop, intake.count, intake.pause, intake.go_on)
        intake.open(loop, self._make_protocol, self.config.ssl)

    def _courtesy_of(
        self,
        loop: asyncio.AbstractEventLoop,
        count: Callable[[], int],
        stop: Callable[[], object],
        go_on: Callable[[], object],
    ) -> Courtesy | None:
        balance = self._door.balance
        if balance is None:
            return None
        return Courtesy(balance, loop, self._door.filenos(), count, stop, go_on)

    def _make_protocol(self) -> Any:
        make: Any = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _take_no_more(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._by_loop is not None:
            self._by_loop.close()
        self._intake.close(loop)


def _fix_log_level() -> None:
    """Give uvicorn's log the level that it has by way of others: where it has none of its own, uvicorn puts together a
    line of its trace for each connection that begins and ends, for nobody (1 µs each)."""
    log = logging.getLogger("uvicorn.error")
    if log.level == logging.NOTSET:
        log.setLevel(log.getEffectiveLevel())


class _Watched:
    """The application, with its requests counted.

    A request that does nothing for `timeout_s` seconds (receives nothing, sends nothing) is cancelled: that costs
    nobody else anything. A loop that does not turn is the server's to see.

    All that is ours in a request is one call of this, without calls of its own: five of them made a request 5 % longer
    than uvicorn's (instructions, as valgrind counts them).

    Attributes:
        failure: why it is not served, if it is not; in one line.
        in_child: this is a child that a request has forked.
        begun: requests so far.
    """

    failure = "uvicorn has not started: see what it has logged"
    in_child = False

    def __init__(self, app: Application, worker: ServerWorker, timeout_s: float | None) -> None:
        self._app = app
        self._forwarded_app: Application | None = None
        self._worker = worker
        self._counts = worker.progress.counts
        self.begun = self._finished = 0
        self._timeout_s = timeout_s

    def trust(self, proxies: Any) -> None:
        """Heed what `proxies` (as uvicorn's forwarded_allow_ips) say of whom they forward a request for.

        uvicorn does that, but is asked only where a request says so: to be asked costs each one 5 % (instructions).
        """
        middleware = proxy_headers.ProxyHeadersMiddleware
        self._forwarded_app = middleware(self._app, trusted_hosts=proxies)  # type: ignore[arg-type, unused-ignore]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._hearing(send))
            return
        self._counts[BEGUN] = self.begun = self.begun + 1
        try:
            app = self._app
            if self._forwarded_app is not None:
                for name, _ in scope["headers"]:
                    if name in _FORWARDED:
                        app = self._forwarded_app
                        break
            if self._timeout_s is None or scope["type"] != "http":
                await app(scope, receive, send)
            else:
                await self._answer(app, scope, receive, send, self._timeout_s)
        finally:
            if self.in_child:
                os._exit(1)  # it is not a worker, and must not go on as one
            self._counts[FINISHED] = self._finished = self._finished + 1
            if self._worker.max_requests is not None:
                self._worker.ended(self._finished)

    def _hearing(self, send: Callable[[Message], Awaitable[None]]) -> Callable[[Message], Awaitable[None]]:
        async def send_heard(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and (said := message.get("message", "").strip()):
                # Its last line, as starlette says a traceback.
                self.failure = f"the application failed at its start (lifespan): {said.splitlines()[-1]}"
            await send(message)

        return send_heard

    async def _answer(self, app: Application, scope: Any, receive: Any, send: Any, timeout_s: float) -> None:
        watch = _Watch(timeout_s, scope)

        async def send_watched(message: Message) -> None:
            watch.moved_on()
            await send(message)

        async def receive_watched() -> Any:
            message = await receive()
            watch.moved_on()
            return message

        try:
            await app(scope, receive_watched, send_watched)
        finally:
            watch.close()


def _waits_at(awaited: Any) -> list[str]:
    """The lines at which a coroutine waits, the innermost first, to the application's outermost.

    `Task.get_stack` has the outermost of all only.
    """
    where: list[str] = []
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)) is not None:
        file = frame.f_code.co_filename
        if file == __file__:
            where.clear()  # what is before, and this, is not the application; nor is what heeds proxies, next
        elif where or file != proxy_headers.__file__:
            where.insert(0, f"{file}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return where


class _Watch:
    """Cancels the running task if it has not moved on for so long."""

    def __init__(self, timeout_s: float, scope: Any) -> None:
        self._timeout_s = timeout_s
        self._path = f"{scope['method']} {scope['path']}"
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since = self._loop.time()
        self._timer = self._loop.call_later(timeout_s, self._look)

    def moved_on(self) -> None:
        self._since = self._loop.time()

    def _look(self) -> None:
        left_s = self._since + self._timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        assert self._task is not None
        log(
            _LOGGER,
            logging.ERROR,
            "%s has not moved on for request_timeout=%g seconds, and is cancelled; it waits at %s",
            self._path,
            self._timeout_s,
            " < ".join(_waits_at(self._task.get_coro())) or "?",
            extra={"event": "request_cancelled"},
        )
        self._task.cancel()

    def close(self) -> None:
        self._timer.cancel()
