"""The pump: the one thread of a client that always waits, for answers, deaths and deadlines.

Answers may also be taken, and futures settled, by a thread that waits for one (`_receiver`); reports, time and
the end of the pool are dealt with here alone, and so are callbacks, with the lock free, as they are user code.
"""

from __future__ import annotations

import math
import selectors
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from . import _messages, _spill, fds
from ._broken import describe_status
from ._clock import CLOCK
from ._critical import block_signals, put_back
from ._links import Exit, SlotLink, Waker
from ._receiver import Receiver
from ._signals import Mask
from ._tasks import TaskFuture
from .errors import RemoteTraceback

if TYPE_CHECKING:
    from ._client import Client

#: After how long in user code the pump looks again for deaths and deadlines, once what runs just then is over: results
#: that are loaded, callbacks, and log handlers, each.
_TURN_S = 0.005


class Pump:
    """The waiting thread of `client`. Made and closed by it; `watch` and `wake` are for any thread.

    Attributes:
        receiver: takes the answers.
    """

    def __init__(self, client: Client, mask: Mask) -> None:
        self._client = client
        self._mask = mask  # the signals that callbacks find blocked
        thread = threading.Thread(target=self._run, name="fdpool-pump", daemon=True)
        self._thread: threading.Thread | None = thread
        self._ident: int | None = None  # of the thread, as long as it runs
        self._callbacks: deque[TaskFuture[Any]] = deque()
        self._selector = fds.made_above_stdio(selectors.DefaultSelector)
        try:
            self._waker = Waker()
        except BaseException:
            self._selector.close()
            raise
        try:
            self.receiver = Receiver(client, self._call_back, self.wake)
        except BaseException:
            self._selector.close()
            self._waker.close()
            raise
        self._selector.register(self._waker, selectors.EVENT_READ)
        answers = self.receiver.watched_by_pump()
        if answers is not None:
            self._selector.register(answers, selectors.EVENT_READ, self.receiver)
        self._ticks_at: float | None = None
        self._limits_at: float | None = None
        self._look_again = False  # touched by the thread alone

    def start(self) -> None:
        """Begin, once the client has its control link.

        Raises:
            RuntimeError: no thread can be started.
        """
        self.watch_control()
        assert self._thread is not None
        self._thread.start()

    def watch_control(self) -> None:
        """Receive what the supervisor reports from now on."""
        assert self._client.control is not None
        self._selector.register(self._client.control.socket, selectors.EVENT_READ, self._client.control)

    @property
    def is_current(self) -> bool:
        """True if this is the pump's own thread."""
        return threading.get_ident() == self._ident

    def join(self) -> None:
        """Wait for the thread's end; from that thread itself, return at once."""
        thread = self._thread
        if thread is not None and threading.current_thread() is not thread:
            thread.join()
            # An ended thread that is kept in a cycle looks like a leak (threading._dangling).
            self._thread = None

    def watch(self, link: SlotLink) -> None:
        """Receive what comes on a slot from now on."""
        if not self.receiver.watch(link):
            self._selector.register(link.mine, selectors.EVENT_READ, link)
            self.wake()

    def wake(self) -> None:
        """Make the thread look again before it waits; from any thread, itself included.

        It may be in the pump that an event is handled after it has worked out how long to wait.
        """
        if self.is_current:
            self._look_again = True
        else:
            self._waker.wake()

    def close(self, abandoned: bool = False) -> None:
        """Close the descriptors; whatever was watched is to be closed as well, and by its owner.

        Args:
            abandoned: this is a forked child, where the threads that used them are not.
        """
        self.receiver.close(abandoned)
        self._selector.close()
        self._waker.close()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Runs in: the pump. Never raises: what goes wrong here breaks the pool, and so settles every future."""
        self._ident = threading.get_ident()
        # A signal that the main thread blocks must not find its way through this one instead.
        block_signals()
        try:
            while not self._client.life.is_over:
                self._turn()
            self.settle()
        except Exception as error:
            self._crash(error)
        self._client.close()
        self._ident = None  # others may be given it

    def _turn(self) -> None:
        """Wait once, handle what came, settle futures, and see whether the pool can move on in its end."""
        client = self._client
        # Then answers stay where they are: what they hold, descriptors among it, would pile up here.
        is_behind = self.receiver.pending or bool(self._callbacks) or bool(client.news)
        timeout_s = self._timeout_s(is_behind)
        ready = self._selector.select(0.0 if self._look_again else timeout_s)
        self._look_again = False
        self.receiver.reclaim()
        for key, _ in ready:
            if key.data is self.receiver:
                if not is_behind:
                    self.receiver.take_ready()
            elif isinstance(key.data, SlotLink):
                if not is_behind:
                    self.receiver.take_from(key.data)
            elif key.data is None:
                self._waker.clear()
            elif not self._receive_reports():
                return
        if self._ticks_at is not None and self._ticks_at <= CLOCK.monotonic():
            client.critical.post(client.dispatcher.tick, CLOCK.monotonic())
        looks_at = client.inboxes.looks_at
        if looks_at is not None and looks_at <= CLOCK.monotonic():
            client.critical.post(client.inboxes.look_after)
        if self._limits_at is not None and self._limits_at <= CLOCK.monotonic():
            client.critical.post(client.limits.look)
        _spill.expire(CLOCK.monotonic())
        client.critical.drain()
        client.life.mend()
        self.settle(_TURN_S)
        client.life.move_on()

    def _timeout_s(self, is_behind: bool) -> float | None:
        """How long nothing needs to be done unless something comes; `is_behind`: something is to be settled or told."""
        client = self._client
        with client.critical:
            self._ticks_at = client.dispatcher.next_deadline()
            self._limits_at = client.limits.next_look()
            deadline = client.wanted_at(self._ticks_at, self._limits_at)
        if is_behind or client.critical.pending:
            return 0.0
        look = self.receiver.next_look()
        if deadline is None:
            return look
        remaining_s = min(max(0.0, deadline - CLOCK.monotonic()), fds.LONGEST_POLL_S)
        return remaining_s if look is None else min(look, remaining_s)

    def _crash(self, error: Exception) -> None:
        """A defect of our own. Closing the control link has every worker killed; nobody waits in vain."""
        client = self._client
        with client.critical:
            client.life.break_pool(f"a defect in fdpool's pump: {type(error).__name__}: {error}", error)
            if client.control is not None:
                client.control.socket.close()
        self.settle()
        with client.critical:
            client.life.bury()

    # -- futures -------------------------------------------------------------------------------------------

    def settle(self, turn_s: float = math.inf) -> None:
        """Runs in: the pump. Settle what is due, call back, and tell the news: each in its order, at least one, and no
        more once `turn_s` seconds are over. Another thread may add to it all the time."""
        self.receiver.settle(CLOCK.monotonic() + turn_s)
        news = self._client.news
        if not self._callbacks and not news:
            return
        put_back(self._mask)  # a callback may start programs, which inherit the mask
        try:
            until = CLOCK.monotonic() + turn_s
            while self._callbacks:
                self._callbacks.popleft().call_back()
                if CLOCK.monotonic() >= until:
                    break
            news.tell(CLOCK.monotonic() + turn_s)
        finally:
            block_signals()

    def _call_back(self, future: TaskFuture[Any]) -> None:
        self._callbacks.append(future)
        self.wake()

    # -- reports -------------------------------------------------------------------------------------------

    def _receive_reports(self) -> bool:
        """Read the supervisor's frames; False if it has gone, and the pool with it."""
        control = self._client.control
        assert control is not None
        try:
            while (frame := control.try_receive()) is not None:
                self._take_report(*frame)
        except EOFError as ended:
            ended.__traceback__ = None  # the link keeps it, and it would keep this thread's frames
            self._selector.unregister(control.socket)
            return self._client.life.supervisor_gone()
        return True

    def _take_report(self, report: _messages.ToClient, numbers: list[int]) -> None:
        client = self._client
        if isinstance(report, _messages.WorkerStarted):
            client.links[report.slot].began(report.pid, numbers)
        elif isinstance(report, _messages.WorkerExited):
            client.life.last_death = describe_status(report.status)
            self.worker_gone(report.slot, Exit(report.pid, report.status, report.stacks, report.hint))
        elif isinstance(report, _messages.StartFailed):
            client.life.last_death = f"could not be started: {report.reason}"
            self.worker_gone(report.slot, Exit(0, None, refused=report.for_now))
        else:
            reason = f"module {report.module!r} of preload= cannot be imported: {report.reason}"
            client.critical.post(client.life.break_pool, reason, RemoteTraceback(report.traceback))

    def worker_gone(self, slot: int, death: Exit) -> None:
        """Settle a dead worker's slot: first every answer that it sent, then what it left unread, then the loss."""
        link = self._client.links[slot]
        board = self._client.board
        assert board is not None
        self.receiver.take_last(link, board, self._post_exit, link, death._replace(said=board.said(slot)))

    def _post_exit(self, link: SlotLink, death: Exit) -> None:
        link.ended(death)
        self._client.critical.post(self._client.worker_exited, link.slot)
