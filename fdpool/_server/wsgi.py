"""Serving a WSGI application with waitress, in a server worker.

What is ours: where connections come from, when to stop taking them, what becomes of those that are kept alive
meanwhile, and telling how far requests are. What speaks HTTP, buffers slow clients and keeps the threads is waitress.
Who runs requests is in a file of its own: threads beside the loop (`_server.threads`), or, of one thread, the loop
itself (`_server.inline`).
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - getaddrinfo(3) of waitress's default address: so each worker need not (0.6 MiB)
import logging
import math
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from waitress import wasyncore
from waitress.server import BaseWSGIServer, create_server

from .._clock import CLOCK
from .._log import log
from ..fds import is_readable
from . import room
from .context import Order, ServerWorker
from .courtesy import PolledCourtesy
from .doors import Door, Listening
from .inline import InlineTasks
from .threads import Threads

_IDLE_S = 5.0  # how long a client that keeps its connection has for one more request, while the worker drains
_TURN_S = 1.0
_CUT_S = 0.2  # for a thread that is sending; one may read a file for that, which can take any time
_LOGGER = "fdpool.server"


class Tasks(Protocol):
    """Who runs the requests; to waitress, its dispatcher of tasks.

    Attributes:
        channel_class, task_class: waitress's connection and request, as they are served that way.
    """

    channel_class: Any
    task_class: Any

    def prepare(self, server: BaseWSGIServer) -> None:
        """Before `server` gets its first connection."""

    def running(self) -> AbstractContextManager[None]:
        """Around all of the loop's turns; in the main thread."""

    @property
    def has_waiting(self) -> bool:
        """True if there is more to do after the next turn of the loop, which is not to wait then."""

    @property
    def may_take(self) -> bool:
        """True if a connection that comes now would be served at once. Otherwise others may be free to take it."""

    def before_turn(self) -> None:
        """Before each turn of the loop."""

    def after_turn(self, servers: Sequence[BaseWSGIServer]) -> None:
        """After each turn of the loop."""

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5.0) -> bool:
        """For waitress, and at the end: nothing more is run."""


class WsgiFace:
    """waitress on the worker's listeners, or on connections that it is handed."""

    def __init__(
        self, app: Any, order: Order, worker: ServerWorker, door: Door, listeners: Sequence[socket.socket]
    ) -> None:
        self._worker = worker
        self._door = door
        self._map: dict[int, Any] = {}
        self._turning = threading.Lock()  # held by the loop in its turns, and not while it runs requests
        self._waking = threading.Lock()  # held to wake the loop, and to say that it has ended
        self._has_ended = False
        self._drains: deque[Callable[[], None]] = deque()  # told, and not begun
        self._until: float | None = None  # a drain's end
        self._idle_at = 0.0
        self._cleanup_at = 0.0
        options = {
            "threads": order.threads or 4,
            "backlog": order.backlog,
            "ident": None,
            # waitress's own, 100, is used up for two minutes (`channel_timeout`) by so many that are idle.
            "connection_limit": room.for_connections(),
            **order.options,
        }
        threads = int(options["threads"])
        self._tasks: Tasks = InlineTasks() if threads == 1 else Threads(threads)
        if threads > 1:
            worker.progress.runs_at_most(threads)
        accepts = isinstance(door, Listening)
        self._servers: list[BaseWSGIServer] = [
            create_server(
                app, map=self._map, _start=accepts, _dispatcher=self._tasks, sockets=[listener], **options
            )
            for listener in listeners
        ]
        self._courtesy: PolledCourtesy | None = None
        if door.balance is not None:
            self._courtesy = PolledCourtesy(door.balance, door.filenos(), self._count_open, threads)
        channel = _channel_class(worker, door, self._tasks, self._tell_open)
        for server in self._servers:
            server.channel_class = channel
            self._guard(server.trigger)
            self._tasks.prepare(server)
            server.next_channel_cleanup = math.inf  # `_close_idle` does it
            if accepts:
                _accept_by(server, door, self._takes, self._leaves_it)
            else:
                server.del_channel()  # never to be polled: the server hands its connections over
        if not accepts:
            for fileno in door.filenos():
                self._map[fileno] = _Intake(fileno, door, self._servers, self._takes, self._tell_open)

    def serve(self, ready: Callable[[], None]) -> None:
        with self._tasks.running():
            ready()
            while self._until is None or not self._has_drained(self._until):
                self._tasks.before_turn()
                with self._turning:
                    wasyncore.loop(timeout=self._timeout_s(), use_poll=True, map=self._map, count=1)
                while self._drains:  # asked again without the lock: one may have come that did not get it
                    with self._turning:
                        self._begin_drains()
                self._close_idle()
                self._tasks.after_turn(self._servers)
            left_s = max(0.0, self._until - CLOCK.monotonic())
            self._tasks.shutdown(timeout=left_s)
            self.close()

    def close(self) -> None:
        with self._waking:
            self._has_ended = True
        for server in self._servers:
            for channel in list(server.active_channels.values()):
                _cut_off(channel)
        wasyncore.close_all(self._map, ignore_all=True)
        for server in self._servers:
            server.close()

    def drain(self, grace_s: float, leaving: bool) -> None:
        now = CLOCK.monotonic()

        def begin() -> None:
            self._idle_at = now if leaving else now + _IDLE_S
            if self._until is None:
                for server in self._servers:
                    # Not its own close(): that would close its trigger, with which threads wake the loop.
                    wasyncore.dispatcher.close(server)
                for fileno in self._door.filenos():
                    self._map.pop(fileno, None)
                self._door.close()
                self._worker.closed()
            self._until = now + grace_s

        self._drains.append(begin)
        self._servers[0].trigger.pull_trigger()
        # Begun here if the loop runs requests, which are not waited for: nothing more is taken from now on. Otherwise
        # it has a turn, after which it looks at what it was told; so nobody waits for the lock, which it holds nearly
        # always while it has nothing to do.
        if self._turning.acquire(blocking=False):
            try:
                self._begin_drains()
            finally:
                self._turning.release()

    def _guard(self, trigger: Any) -> None:
        """Have nobody wake the loop once it has ended: a drain may, and threads that are not waited for any more."""
        pull = trigger._physical_pull

        def pull_unless_ended() -> None:
            with self._waking:
                if not self._has_ended:  # or its descriptor is closed, and the number may be another's
                    pull()

        trigger._physical_pull = pull_unless_ended

    def _begin_drains(self) -> None:
        """With `_turning` held, as the loop goes through what is closed here."""
        while self._drains:
            self._drains.popleft()()

    def _close_idle(self) -> None:
        """Close connections that have been idle for too long, after a turn in which each was read and written to.

        waitress does it before a turn, which with one thread is after requests: all that a client had sent or taken
        while they ran would count as nothing, and the time as its own. And it looks at a clock that may be set.
        """
        now = CLOCK.monotonic()
        if now < self._cleanup_at:
            return
        self._cleanup_at = now + self._servers[0].adj.cleanup_interval
        for server in self._servers:
            server.maintenance(now)
            for channel in list(server.active_channels.values()):
                if channel.will_close:
                    channel.handle_write()  # which closes, too, after what is still to be sent

    def _takes(self) -> bool:
        """True if a connection that comes now would be taken."""
        return self._tasks.may_take and not self._pause_s()

    def _pause_s(self) -> float:
        """For how long none is to be taken."""
        return self._door.pause_s() or (0.0 if self._courtesy is None else self._courtesy.pause_s())

    def _leaves_it(self) -> bool:
        """True if a connection that has come is left to other workers for now."""
        return self._courtesy is not None and self._courtesy.leaves_it()

    def _count_open(self) -> int:
        return sum(len(server.active_channels) for server in self._servers)

    def _tell_open(self) -> None:
        """A connection has come by the server's hand, or gone."""
        self._worker.progress.has_open(self._count_open())
        if self._courtesy is not None:
            self._courtesy.tell()

    def _timeout_s(self) -> float:
        """For how long a turn of the loop may wait."""
        if self._tasks.has_waiting:
            return 0.0
        timeout_s = _TURN_S if self._until is None else 0.05
        return max(0.001, min(timeout_s, self._pause_s() or timeout_s))

    def _has_drained(self, until: float) -> bool:
        now = CLOCK.monotonic()
        channels = [each for server in self._servers for each in list(server.active_channels.values())]
        if now >= self._idle_at:
            for channel in channels:
                if not channel.requests and not channel.total_outbufs_len and not _has_input(channel):
                    channel.will_close = True
        return not channels or now >= until


def _accept_by(server: Any, door: Door, takes: Callable[[], bool], leaves_it: Callable[[], bool]) -> None:
    """Have a waitress server take its connections as every worker does, the limit of descriptors included."""
    fileno = server.socket.fileno()
    readable = server.readable

    def accept() -> None:
        connection = None if leaves_it() else door.take(fileno)
        if connection is not None:
            _take_on(server, connection)

    server.handle_accept = lambda: _survive(accept)
    server.readable = lambda: takes() and readable()


def _take_on(server: Any, connection: socket.socket) -> None:
    """Have waitress serve a connection; owned from here on."""
    try:
        server.set_socket_options(connection)
        address = server.fix_addr(connection.getpeername())
        channel = server.channel_class(server, connection, address, server.adj, map=server._map)
    except OSError:
        connection.close()  # the client has gone
    else:
        channel.read_at_once()


def _survive(take: Callable[[], None]) -> None:
    """Take a connection. What is raised costs that one, and not those to come: waitress would close what they come by
    for good. (With one thread an application's signal handler may raise anywhere, as an alarm that rings late.)"""
    try:
        take()
    except Exception:
        log(
            _LOGGER,
            logging.ERROR,
            "a connection could not be taken in process %d",
            os.getpid(),
            extra={"event": "connection_lost"},
            exc_info=True,
        )


class _Intake:
    """Stands in waitress's loop for the worker's inbox."""

    def __init__(
        self,
        fileno: int,
        door: Door,
        servers: Sequence[Any],
        takes: Callable[[], bool],
        tell_open: Callable[[], None],
    ) -> None:
        self._fileno = fileno
        self._door = door
        self._servers = servers
        self._takes = takes
        self._tell_open = tell_open

    def readable(self) -> bool:
        return self._takes()

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        _survive(self._take)

    def _take(self) -> None:
        connection = self._door.take(self._fileno)
        if connection is None:
            return
        _take_on(self._server_for(connection), connection)
        self._tell_open()

    def _server_for(self, connection: socket.socket) -> Any:
        """Of which listener the connection is: it tells the application its port."""
        name = connection.getsockname()
        for server in self._servers:
            if server.family == connection.family and (
                not isinstance(name, tuple) or str(server.effective_port) == str(name[1])
            ):
                return server
        return self._servers[0]

    def close(self) -> None:
        """For wasyncore.close_all."""


def _channel_class(
    worker: ServerWorker, door: Door, tasks: Tasks, tell_open: Callable[[], None]
) -> type[Any]:
    """waitress's connection, with its requests told, and its answers marked while the worker drains."""
    task_base: Any = tasks.task_class
    channel_base: Any = tasks.channel_class

    class Task(task_base):  # type: ignore[misc]
        def execute(self) -> None:
            try:
                super().execute()
            except Exception:
                raise
            except BaseException as error:
                # SystemExit, say. Of what is no Exception waitress keeps the connection, and never closes it.
                raise RuntimeError(f"the application raised {type(error).__name__}") from error
            finally:
                # Before any lock: another thread may have held it at the fork, and nobody lets go of it in the child.
                worker.leave_if_forked()

        def get_environment(self) -> Any:
            environ = super().get_environment()
            environ["wsgi.multiprocess"] = True  # PEP 3333: there are other workers
            # waitress says None where no `Server` header is sent (`ident`).
            environ["SERVER_SOFTWARE"] = environ["SERVER_SOFTWARE"] or "waitress"
            return environ

        def build_response_header(self) -> Any:
            if worker.draining:
                self.request.headers["CONNECTION"] = "close"
            return super().build_response_header()

    class Channel(channel_base):  # type: ignore[misc]
        task_class = Task
        token = 0
        _active_at = 0.0

        @property
        def last_activity(self) -> float:
            """By the clock that nobody sets: when waitress last took note of the time, by the other one."""
            return self._active_at

        @last_activity.setter
        def last_activity(self, _moment: float) -> None:
            self._active_at = CLOCK.monotonic()

        def read_at_once(self) -> None:
            """Most clients send with the connection: that is read here, a turn of the loop earlier."""
            try:
                data = self.socket.recv(self.adj.recv_bytes)
            except OSError:
                return  # nothing yet; or a reset, of which the loop hears
            if not data:
                self.handle_close()
                return
            try:
                self.received(data)
            except Exception:  # as waitress's loop does: its parser raises, of some requests that are none
                self.handle_error()

        def service(self) -> None:
            # Kept here as well: the connection's next request may have begun before this call ends, in another thread.
            token = self.token = worker.progress.begin()
            try:
                super().service()
            finally:
                worker.leave_if_forked()
                worker.ended(worker.progress.end(token))

        def _flush_some(self, do_close: bool = True) -> Any:
            sent = super()._flush_some(do_close)
            if sent and self.total_outbufs_len > self.adj.outbuf_high_watermark:
                worker.progress.touch(self.token)  # its request waits for that, if it has more
            if not sent and self.total_outbufs_len and not self.outbufs[0].get(1):
                # A file of `wsgi.file_wrapper`, whose length was looked at before. Whoever has called closes then.
                raise EOFError(
                    f"a file has become shorter as it was sent: {self.total_outbufs_len} bytes are missing"
                )
            return sent

        def write_soon(self, data: Any) -> Any:
            worker.leave_if_forked()  # before it answers as well
            worker.progress.touch(self.token)
            return super().write_soon(data)

        def handle_close(self) -> None:
            super().handle_close()
            tell_open()
            door.ended()

    return Channel


def _cut_off(channel: Any) -> None:
    """Close a connection whose request may still run: it hears of that as of a client that has gone.

    With the lock that its thread holds as it sends: the descriptor's number may be another's in a moment.
    """
    has_lock = channel.outbuf_lock.acquire(timeout=_CUT_S)
    try:
        if has_lock:
            channel.handle_close()
        else:
            channel.close()
    finally:
        if has_lock:
            channel.outbuf_lock.release()


def _has_input(channel: Any) -> bool:
    """True if the client has sent something that was not read yet."""
    if channel.socket is None or channel.request is not None:
        return channel.request is not None
    return is_readable(channel.socket)
