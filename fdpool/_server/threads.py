"""Serving WSGI requests in waitress's threads, beside its loop: in a worker of several threads.

What is ours: connections are taken as there are threads for them, the loop is woken once for several answers, and it
closes connections a turn earlier.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ThreadedTaskDispatcher, WSGITask

from .._clock import CLOCK

_MOST_WITH_HEADER = 64 * 1024  # of a longer block the copy costs more than a system call
_NO_LOG = logging.Logger("fdpool.server.queue", logging.CRITICAL)


class ThreadsTask(WSGITask):  # type: ignore[misc]  # waitress has no types
    """A request, whose thread tells that it is about to be free: before the loop is woken for the answer."""

    def write(self, data: Any) -> None:
        # waitress sends the header by itself, and then the block: a system call more for most answers, and a packet;
        # and for each the thread lets go of the interpreter's lock, and waits for it with the others.
        if self.wrote_header or not data or len(data) > _MOST_WITH_HEADER:
            super().write(data)
            return
        channel = self.channel
        channel.holds_header = True
        try:
            super().write(data)
        finally:
            channel.let_go_of_header()

    def service(self) -> None:
        try:
            super().service()
        finally:
            self.channel.server.task_dispatcher.served()


class ThreadsChannel(HTTPChannel):  # type: ignore[misc]
    """waitress's connection, which tells the dispatcher as it has a thread, and lets go of it.

    Attributes:
        holds_header: what is written next is a header, and goes with what comes after it.
    """

    holds_header = False
    _header = b""

    def write_soon(self, data: Any) -> Any:
        if self.holds_header:
            self.holds_header, self._header = False, data
            return len(data)
        if self._header:
            self._header, data = b"", self._header + data
        return super().write_soon(data)

    def let_go_of_header(self) -> None:
        """Send it by itself, if nothing has come after it."""
        self.holds_header = False
        if self._header:
            self.write_soon(b"")

    def service(self) -> None:
        tasks = self.server.task_dispatcher
        tasks.begins()
        try:
            super().service()
        finally:
            if tasks.served() or not self.connected:  # it was no request; or the loop is not woken for it
                self.server.pull_trigger()


class Threads(ThreadedTaskDispatcher):  # type: ignore[misc]
    """waitress's dispatcher of tasks; so many threads, once it is `running`."""

    channel_class = ThreadsChannel
    task_class = ThreadsTask
    queue_logger = _NO_LOG  # a warning for each request that waits, while others are served
    has_waiting = False  # whose requests have run wake the loop
    may_take = True

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._unserved = 0  # requests that wait for a thread, or have one
        self._served = 0
        # Whether it has a request: of each thread. A connection may have two, as its next request begins.
        self._mine = threading.local()
        self._round = math.inf  # how many are served when all are that were there as no thread was free

    def prepare(self, server: Any) -> None:
        """Have its loop woken once for all that threads have done meanwhile, and not by each for itself."""
        trigger = server.trigger
        pull, take = trigger._physical_pull, trigger.recv
        pulled = threading.Event()

        def pull_once() -> None:
            if not pulled.is_set():
                pulled.set()
                pull()

        def recv(size: int) -> Any:
            try:
                return take(size)
            finally:
                # After the pipe was emptied, or a pull meanwhile would be taken along and still count as made; and
                # before it is looked at what there is to do, so that whoever finds it made is looked at.
                pulled.clear()

        trigger._physical_pull, trigger.recv = pull_once, recv

    def add_task(self, task: Any) -> None:
        """For waitress: a connection has a request."""
        with self.lock:
            self._unserved += 1
        super().add_task(task)

    def begins(self) -> None:
        """Runs in: a thread, which has a request."""
        self._mine.has_request = True

    def served(self) -> bool:
        """Runs in: a thread, which has no request any more; True if it had one until now."""
        had_request: bool = self._mine.has_request
        if had_request:
            self._mine.has_request = False
            with self.lock:
                self._unserved -= 1
                self._served += 1
        return had_request

    def before_turn(self) -> None:
        """Take a connection if a thread is free for it: else others may be, and it is not lost if this worker dies.

        Or if all requests are served that were there when none was free: those on connections that are kept may come so
        often that never one is.
        """
        self.may_take = self._unserved < self._count or self._served >= self._round
        if self.may_take:
            self._round = math.inf
        elif self._round == math.inf:
            with self.lock:
                self._round = self._served + self._unserved

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the threads; who serves has them end."""
        self.set_thread_count(self._count)
        yield

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5.0) -> bool:
        """As waitress does, but that `timeout` is not of the wall clock, which may be set meanwhile."""
        until = CLOCK.monotonic() + timeout
        self.set_thread_count(0)
        with self.lock:
            while self.threads and (left_s := until - CLOCK.monotonic()) > 0:
                self.thread_exit_cv.wait(left_s)
        return bool(super().shutdown(cancel_pending, timeout=-math.inf))  # no more waiting

    def after_turn(self, servers: Sequence[Any]) -> None:
        """Close connections whose last answer has gone; by itself waitress would take another turn of its loop."""
        for server in servers:
            for channel in list(server.active_channels.values()):
                if channel.close_when_flushed and not channel.total_outbufs_len:
                    channel.handle_write()
