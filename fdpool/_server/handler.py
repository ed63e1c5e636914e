"""Serving connections with a plain function or a `socketserver` class; and applications that accept for themselves.

Runs in: a server worker.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .._clock import CLOCK
from .._links import Waker
from .._log import log
from . import apps
from .context import ServerWorker
from .doors import Door

Handle = Callable[[socket.socket, Any], object]

_LOGGER = "fdpool.server"


class HandlerFace:
    """Calls `handle(connection, address)` for each connection, and closes that afterwards.

    Args:
        handle: what it raises is logged and costs only its connection.
        threads: how many connections at a time. One at a time is served in the main thread.
    """

    def __init__(self, handle: Handle, worker: ServerWorker, door: Door, threads: int) -> None:
        self._handle = handle
        self._worker = worker
        self._door = door
        self._threads = threads
        self._busy = (
            0  # connections that threads have; written in the main thread and, after one, in its thread
        )
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._waker = Waker()
        self._accepted: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._draining = False
        self._cut_at: float | None = None

    def serve(self, ready: Callable[[], None]) -> None:
        threads = [self._start_thread(number) for number in range(self._threads if self._threads > 1 else 0)]
        ready()
        while not self._draining:
            self._turn()
        self._door.close()
        for _ in threads:
            self._accepted.put(None)
        for thread in threads:
            left_s = None if self._cut_at is None else max(0.0, self._cut_at - CLOCK.monotonic())
            thread.join(left_s)
        self._waker.close()

    def drain(self, grace_s: float, leaving: bool) -> None:
        self._cut_at = CLOCK.monotonic() + grace_s
        with self._taking:  # so nobody is about to accept
            self._draining = True
        self._worker.closed()
        self._waker.wake()

    def close(self) -> None:
        pass  # nothing is open before it serves

    def _start_thread(self, number: int) -> threading.Thread:
        # A daemon: a connection that outlasts the grace must not keep the process.
        thread = threading.Thread(target=self._run_thread, name=f"fdpool-server-{number}", daemon=True)
        thread.start()
        return thread

    def _turn(self) -> None:
        """Wait once, and serve or hand on what has come."""
        poll = select.poll()
        poll.register(self._waker.fileno(), select.POLLIN)
        pause_s = self._door.pause_s()
        if not pause_s and self._busy < self._threads:
            for fileno in self._door.filenos():
                poll.register(fileno, select.POLLIN)
        for fileno, _ in poll.poll(pause_s * 1000 + 1 if pause_s else None):
            if fileno == self._waker.fileno():
                self._waker.clear()
            elif self._busy < self._threads:
                with self._taking:
                    connection = None if self._draining else self._door.take(fileno)
                if connection is not None:
                    self._take_on(connection)

    def _take_on(self, connection: socket.socket) -> None:
        if self._threads == 1:
            self._serve_one(connection)
            return
        with self._lock:
            self._busy += 1
        self._accepted.put(connection)

    def _run_thread(self) -> None:
        while (connection := self._accepted.get()) is not None:
            try:
                self._serve_one(connection)
            finally:
                with self._lock:
                    self._busy -= 1
                    was_full = self._busy == self._threads - 1
                if was_full:
                    self._waker.wake()

    def _serve_one(self, connection: socket.socket) -> None:
        progress = self._worker.progress
        token = progress.begin()
        progress.has_open_what_runs()
        try:
            with connection:
                try:
                    address = connection.getpeername()
                except OSError as error:  # ENOTCONN: it was reset while it waited
                    raise ConnectionResetError(*error.args) from None
                self._handle(connection, address)
        except ConnectionError as error:
            log(_LOGGER, logging.DEBUG, "a client has gone: %s", error, extra={"event": "client_gone"})
        except BaseException as error:  # SystemExit, say: it would end the thread, or the worker
            if isinstance(error, KeyboardInterrupt) and self._threads == 1:
                raise  # SIGINT, in the main thread
            log(
                _LOGGER,
                logging.ERROR,
                "a connection's handler failed in worker %d",
                self._worker.slot,
                extra={"event": "handler_failed"},
                exc_info=True,
            )
        finally:
            self._worker.leave_if_forked()
            self._worker.ended(progress.end(token))
            progress.has_open_what_runs()
            self._door.ended()


def handler_of(
    cls: type[socketserver.BaseRequestHandler], worker: ServerWorker, listeners: Sequence[socket.socket]
) -> Handle:
    """A function that serves a connection as `socketserver` would, with an object of the class."""
    # What handlers see as `self.server`: its address, and nothing that accepts.
    server = socketserver.BaseServer(listeners[0].getsockname(), cls)

    def handle(connection: socket.socket, address: Any) -> None:
        cls(connection, address, server)
        worker.leave_if_forked()  # the connection is its parent's as well
        try:
            connection.shutdown(socket.SHUT_WR)  # as TCPServer.shutdown_request does
        except OSError:
            pass  # the client was first

    return handle


class ListenersFace:
    """Calls `serve(listeners)` or `serve(listeners, worker)`, which returns when it has drained.

    One that takes the worker says itself when it is ready, and sees there when it is to drain. Any other is
    ready at once, and told to drain by a SIGTERM, as any server is.
    """

    def __init__(
        self, serve: Callable[..., object], worker: ServerWorker, listeners: Sequence[socket.socket]
    ) -> None:
        self._serve = serve
        self._worker = worker
        self._listeners = list(listeners)
        self._takes_worker = apps.takes_worker(serve)
        if not self._takes_worker:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may have ways of its own

    def serve(self, ready: Callable[[], None]) -> None:
        if self._takes_worker:
            self._serve(self._listeners, self._worker)
            return
        ready()
        self._serve(self._listeners)

    def drain(self, grace_s: float, leaving: bool) -> None:
        self._worker.closed()  # or is about to be: it is not ours to see
        if not self._takes_worker:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        pass  # nothing is open before it serves
