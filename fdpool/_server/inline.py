"""Serving WSGI requests in the thread of waitress's loop, one at a time: in a worker with `threads=1`.

waitress runs requests in threads beside its loop. Where there is one of them, each request is handed over twice, and
nobody gains by it. So the loop runs the request itself here, between two of its turns; and what waitress leaves to its
loop while a request runs is done in place.

    a block of the answer          sent before the application is asked for the next; the first with the header
    what the kernel did not take   sent by the loop, after the request or a few short ones, or with the next block
    more than is to be buffered    waited for: until the client takes some, or goes
    a client that has gone         closed as it is noticed; the next block raises ClientDisconnected

Runs in: the main thread of a server worker.
"""

from __future__ import annotations

import select
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import WSGITask
from waitress.utilities import logger

from .._clock import CLOCK
from ..fds import is_readable
from ..wire import wait_for

_MOMENT_S = 0.01  # for how long requests run before the loop has a turn


class InlineChannel(HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """waitress's connection, which does what it can at once, as there is no loop beside it.

    Attributes:
        holding: what is written is not sent for now.
    """

    holding = False

    def send_now(self) -> None:
        """Send as much as the kernel takes, and close if that was all, and the last."""
        if self.socket is not None and self.total_outbufs_len:
            self._flush_exception(self._flush_some)
        is_last = self.close_when_flushed and not self.total_outbufs_len
        if self.socket is not None and (is_last or self.will_close):
            self.handle_close()

    def check_client_disconnected(self) -> Any:
        # With `channel_request_lookahead` the loop would read on, and notice.
        if self.socket is not None and self.readable() and is_readable(self.socket):
            self.handle_read()
        return super().check_client_disconnected()

    def _flush_exception(self, flush: Any, do_close: bool = True) -> Any:
        return (True, False) if self.holding else self._flush(flush)

    def _flush(self, flush: Any) -> Any:
        """As waitress does, but that it closes what is broken: in threads that is left to the loop, which is here."""
        result = super()._flush_exception(flush)
        if result is not None and result[1] and self.socket is not None:
            self.handle_close()
        return result

    def _flush_outbufs_below_high_watermark(self) -> None:
        # waitress waits for its loop to send, which would be for ever.
        while self.connected and self.total_outbufs_len > self.adj.outbuf_high_watermark:
            sent, _ = self._flush(self._flush_some)
            if not sent and self.connected:
                wait_for(self.socket, select.POLLOUT)


class InlineTask(WSGITask):  # type: ignore[misc]
    """waitress's request, whose answer is sent as it comes."""

    def get_environment(self) -> Any:
        environ = super().get_environment()
        environ["wsgi.multithread"] = False
        return environ

    def write(self, data: Any) -> None:
        # waitress sends the header by itself, and then the block: a system call more for most answers, and a packet.
        channel = self.channel
        channel.holding = True
        try:
            super().write(data)
        finally:
            channel.holding = False
        # PEP 3333 ("Buffering and Streaming"): a block is not kept while the application makes the next one. Nor for
        # the request's end: what it does in `close()` is not for the client to wait for.
        if data and channel.total_outbufs_len >= channel.adj.send_bytes:
            channel.send_now()


class InlineTasks:
    """waitress's dispatcher of tasks, without threads: requests run after each turn of the loop."""

    channel_class = InlineChannel
    task_class = InlineTask

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()
        self._left = 0  # of the round
        self._interrupted = False

    def prepare(self, server: Any) -> None:
        """Leave out what is done beside a loop that waits."""
        # None waits while a request runs in its thread; the next turn sees it all.
        server.pull_trigger = lambda: None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have SIGINT end the worker meanwhile, also where it finds an application that would be blamed for it."""
        before = signal.getsignal(signal.SIGINT)
        if not callable(before):
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            self._interrupted = True
            before(number, frame)

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @property
    def has_waiting(self) -> bool:
        """True if a request is to be run."""
        return bool(self._waiting)

    @property
    def may_take(self) -> bool:
        """True unless some of those that waited as the round began still wait."""
        return not self._left

    def add_task(self, task: Any) -> None:
        """For waitress: a connection has a request."""
        # Not run here: the connection's `requests_lock` is held, which a task takes.
        self._waiting.append(task)

    def before_turn(self) -> None:
        """Nothing: `may_take` changes as requests run."""

    def after_turn(self, servers: Sequence[Any]) -> None:
        """Run requests.

        Raises:
            KeyboardInterrupt: the worker was sent SIGINT meanwhile. One that an application raises is no reason.
        """
        del servers
        self._run()
        # Also where nothing waited: it may have come, and been swallowed, in the loop's turn.
        if self._interrupted:
            raise KeyboardInterrupt

    def _run(self) -> None:
        """Run requests for a moment: in a round, one of each connection that has one. A connection's next one comes
        in another round, so that a client that sends many ahead keeps nobody else waiting; and after the moment
        comes a turn of the loop, so that answers that wait for their clients are sent on meanwhile.
        """
        until = CLOCK.monotonic() + _MOMENT_S
        self._left = self._left or len(self._waiting)
        while self._left and not self._interrupted:
            self._left -= 1
            channel = self._waiting.popleft()
            try:
                channel.service()
            except BaseException:  # as waitress's threads do
                logger.exception("Exception when servicing %r", channel)
            channel.send_now()
            if CLOCK.monotonic() >= until:
                break

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5.0) -> bool:
        """For waitress: drop what waits. Nothing runs, as it is called in the thread that would run it."""
        del timeout
        while cancel_pending and self._waiting:
            self._waiting.popleft().cancel()
        return cancel_pending
