"""The pump: the one thread of a client that waits. It receives answers and reports, and settles futures.

Futures are settled here and nowhere else, with the lock free, since loading a result and calling back
are user code.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections import deque
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING

from . import _messages, payload, wire
from ._answers import open_answer
from ._broken import PoolBroken, describe_status
from ._critical import Mask, block_signals, put_back
from ._links import SlotLink, Waker
from ._messages import HEADER_BYTES, MAX_DATAGRAM, Header
from .errors import FdTransferError, WireError
from .fds import SCM_MAX_FD, close_all

if TYPE_CHECKING:
    from ._client import Client

_BATCH = 64  # most answers received from one slot before the others are looked at
_ALL = 1 << 30


class Pump:
    """The waiting thread of `client`. Made and closed by it; `watch`, `wake` and `settle_later` are for any thread."""

    def __init__(self, client: Client, mask: Mask) -> None:
        self._client = client
        self._mask = mask  # the signals that callbacks find blocked
        thread = threading.Thread(target=self._run, name="fdpool-pump", daemon=True)
        self._thread: threading.Thread | None = thread
        self._selector = selectors.DefaultSelector()
        try:
            self._waker = Waker()
        except BaseException:
            self._selector.close()
            raise
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._ticks_at: float | None = None
        self._look_again = False  # touched by the thread alone
        self._to_settle: deque[tuple[int, tuple[Header, wire.Received] | None, BaseException | None]] = (
            deque()
        )

    def start(self) -> None:
        """Begin, once the client has its control link.

        Raises:
            RuntimeError: no thread can be started.
        """
        assert self._client.control is not None
        self._selector.register(self._client.control.socket, selectors.EVENT_READ, self._client.control)
        assert self._thread is not None
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end; from that thread itself, return at once."""
        thread = self._thread
        if thread is not None and threading.current_thread() is not thread:
            thread.join()
            # An ended thread that is kept in a cycle looks like a leak (threading._dangling).
            self._thread = None

    def watch(self, link: SlotLink) -> None:
        """Receive what comes on a slot from now on."""
        self._selector.register(link.mine, selectors.EVENT_READ, link)
        self.wake()

    def wake(self) -> None:
        """Make the thread look again before it waits; from any thread, itself included.

        It may be in the pump that an event is handled after it has worked out how long to wait.
        """
        if threading.current_thread() is self._thread:
            self._look_again = True
        else:
            self._waker.wake()

    def settle_later(self, task: int, error: BaseException) -> None:
        """Have a task settled with an error, in the pump's thread."""
        self._to_settle.append((task, None, error))

    def close(self) -> None:
        """Close the descriptors; whatever was watched is to be closed as well, and by its owner."""
        self._selector.close()
        self._waker.close()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Runs in: the pump. Never raises: what goes wrong here breaks the pool, and so settles every future."""
        # A signal that the main thread blocks must not find its way through this one instead.
        block_signals()
        try:
            while not self._client.is_over:
                self._turn()
        except Exception as error:
            self._crash(error)

    def _turn(self) -> None:
        """Wait once, handle what came, settle futures, and see whether the pool can move on in its end."""
        client = self._client
        timeout_s = self._timeout_s()
        ready = self._selector.select(0.0 if self._look_again else timeout_s)
        self._look_again = False
        for key, _ in ready:
            if isinstance(key.data, SlotLink):
                self._receive_answers(key.data, _BATCH)
            elif key.data is None:
                self._waker.clear()
            elif not self._receive_reports():
                return
        if self._ticks_at is not None and self._ticks_at <= time.monotonic():
            client.critical.post(client.dispatcher.tick, time.monotonic())
        client.critical.drain()
        self.settle_all()
        client.move_on()

    def _timeout_s(self) -> float | None:
        """How long nothing needs to be done unless something comes."""
        client = self._client
        with client.critical:
            deadline = client.wanted_at()
            self._ticks_at = client.dispatcher.next_deadline()
        if client.critical.pending or self._to_settle:
            return 0.0
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _crash(self, error: Exception) -> None:
        """A defect of our own. Closing the control link has every worker killed; nobody waits in vain."""
        client = self._client
        broken = PoolBroken(f"a defect in fdpool's pump: {type(error).__name__}: {error}")
        broken.__cause__ = error
        with client.critical:
            client.break_pool(broken)
            if client.control is not None:
                client.control.socket.close()
        self.settle_all()
        with client.critical:
            client.bury()

    # -- answers -------------------------------------------------------------------------------------------

    def _receive_answers(self, link: SlotLink, most: int) -> None:
        """Receive what a slot's worker has sent; after `most` datagrams the selector will say that there is more."""
        for _ in range(most):
            received = wire.try_receive(link.mine, MAX_DATAGRAM, SCM_MAX_FD)
            if received is None:
                return
            self._take_answer(link.slot, received)

    def _take_answer(self, slot: int, received: wire.Received) -> None:
        """Post what a datagram means. One that answers no task of this slot is closed and passed over."""
        client = self._client
        try:
            header = _messages.unpack_header(received.data)
        except WireError:
            close_all(received.fds)
            return
        if header.kind == _messages.READY:
            client.critical.post(client.dispatcher.readied, slot)
        elif header.kind == _messages.BOOT_FAILED:
            cause = payload.loads_failure(received.data[HEADER_BYTES:], received.fds, header.spilled)
            broken = PoolBroken(f"the pool's initializer failed: {type(cause).__name__}: {cause}")
            broken.__cause__ = cause
            client.critical.post(client.break_pool, broken)
        elif client.dispatcher.slot_of(header.task) != slot:
            close_all(received.fds)
        else:
            self._to_settle.append((header.task, (header, received), None))
            client.critical.post(client.dispatcher.finished, slot, header.task)

    def settle_all(self) -> None:
        """Settle what is due, with signals let through: a callback may start programs, which inherit the mask."""
        if not self._to_settle:
            return
        put_back(self._mask)
        try:
            while self._to_settle:
                self._settle(*self._to_settle.popleft())
        finally:
            block_signals()

    def _settle(
        self, task: int, answer: tuple[Header, wire.Received] | None, error: BaseException | None
    ) -> None:
        record = self._client.tasks.get(task)
        if record is None:
            if answer is not None:
                close_all(answer[1].fds)
            return
        result = None
        if answer is not None:
            result, error = open_answer(*answer)
        future = record.future
        future._client = None
        if record.payload is not None:
            record.payload.close()
        try:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        except InvalidStateError:
            pass  # its owner has settled it by hand
        except BaseException:
            # concurrent.futures logs what a callback raises, but SystemExit and its like it lets through, and the
            # pool would stand still.
            import logging

            logging.getLogger("concurrent.futures").exception("exception calling callback for %r", future)
        finally:
            # Only now: as long as a task is in there, the pool does not end.
            del self._client.tasks[task]

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
            self._client.supervisor_gone()
            return False
        except FdTransferError as error:
            broken = PoolBroken(f"what the pool's supervisor reported was lost: {error}")
            self._client.critical.post(self._client.break_pool, broken)
        return True

    def _take_report(self, report: _messages.ToClient, numbers: list[int]) -> None:
        client = self._client
        if isinstance(report, _messages.WorkerStarted):
            client.links[report.slot].began(report.pid, numbers)
        elif isinstance(report, _messages.WorkerExited):
            client.last_death = describe_status(report.status)
            self._worker_gone(report.slot, report.pid, report.status)
        elif isinstance(report, _messages.StartFailed):
            client.last_death = f"could not be started: {report.reason}"
            self._worker_gone(report.slot, 0, None)
        else:
            reason = f"module {report.module!r} of preload= cannot be imported: {report.reason}"
            client.critical.post(client.break_pool, PoolBroken(reason))

    def _worker_gone(self, slot: int, pid: int, status: int | None) -> None:
        """Settle a dead worker's slot: first every answer that it sent, then what it left unread, then the loss."""
        link = self._client.links[slot]
        self._receive_answers(link, _ALL)
        link.ended(pid, status)
        self._client.critical.post(self._client.worker_exited, slot)
