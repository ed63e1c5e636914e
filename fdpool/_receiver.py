"""Taking what workers have answered, and settling futures with it: by the pump, or by who waits for a result.

A thread that waits for a future receives answers itself, all that come, until its own has: that saves waking
the pump, and being woken by it. The slots' sockets are in an inner epoll, which is in an outer one that the
pump's selector watches. Who waits takes the inner out of the outer's sight, polls it, and puts it back. One
thread at a time may do so; others that wait meanwhile are told by whoever settles.

In the main thread signal handlers run as it waits, and may themselves wait for what is the pump's to do: so the
inner is in sight then, and the pump takes what lies there for longer than who waits would leave it.

Without epoll nobody but the pump receives.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _messages, _platform, payload, wire
from ._answers import Answer, open_answer
from ._board import SETTLE_S, Board
from ._chunks import raised
from ._clock import CLOCK
from ._critical import block_in_main, put_back
from ._links import SlotLink, Waker
from ._messages import HEADER_BYTES, MAX_DATAGRAM, Header
from ._slots import State
from ._spin import Spin
from ._tasks import UNDONE, ChunkFuture, TaskFuture
from .errors import WireError
from .fds import LONGEST_POLL_S, SCM_MAX_FD, close_all, made_above_stdio

if TYPE_CHECKING:
    from ._client import Client

_BATCH = 64  # most answers received from one slot before the others are looked at
_ALL = 1 << 30
#: How long answers may be kept from the pump between two waits. A thread that submits and waits, again and again,
#: would meet the answer before it waits, and the pump be woken for it: 250 microseconds a task against 35.
_KEEP_S = 0.002
_LONG_S = 0.05  # waits that take longer are not worth it

#: Of answers in a batch all else is known: they are small, and hold no descriptors.
_PLAIN = {kind: Header(_messages.VERSION, kind, 0, 0, 0, 0, 0) for kind in (_messages.DONE, _messages.FAILED)}
_NOTHING: list[int] = []

_OF_ONE_TASK = frozenset(
    (_messages.DONE, _messages.FAILED, _messages.REFUSED, _messages.PIECE, _messages.CUT)
)

_CLOSE_S = 5.0  # how long who waits may take to notice the end: it may be loading a result
_EVENTS = 256  # most slots looked at in one go


class Receiver:
    """The receiving side of `client`; thread-safe.

    Args:
        call_back: has the callbacks of a future called that was settled; must not wait.
        look_again: makes the pump ask `next_look` again.

    Attributes:
        strays: messages so far that are none of ours, or that a worker has no reason to send.
    """

    def __init__(
        self, client: Client, call_back: Callable[[TaskFuture[Any]], None], look_again: Callable[[], None]
    ) -> None:
        self._client = client
        self._look_again = look_again
        self.strays = 0  # counted by whoever receives
        self._call_back = call_back
        self._links: dict[int, SlotLink] = {}
        self._waker = Waker()  # makes who waits look at its future again
        # Receiving and posting are one step: who handles a death must not overtake an answer received before.
        self._receiving = threading.RLock()
        self._opening = threading.RLock()  # one thread at a time loads a chunk's results
        self._turn: Any = threading.RLock()  # held by who waits
        self._awaited: TaskFuture[Any] | None = None
        self._others: set[object] = set()  # threads that wait and do not receive
        self._kept = False  # the inner epoll is kept from the pump, which looks for itself now and then
        self._left_at = 0.0  # when somebody last ceased to wait
        self._taken_at = 0.0  # when who waits last took something
        self._noticed_at = 0.0  # when the pump last found something that who waits was to take
        self._spin = Spin()
        self._to_settle: deque[tuple[int, Answer | None, BaseException | None]] = deque()
        self._inner: Any = None
        self._outer: Any = None
        if hasattr(select, "epoll") and _platform.has("epoll"):
            try:
                self._inner, self._outer = made_above_stdio(select.epoll), made_above_stdio(select.epoll)
                self._inner.register(self._waker, select.EPOLLIN)
                self._outer.register(self._inner, select.EPOLLIN)
            except OSError:
                self.close(abandoned=True)
                raise

    def watched_by_pump(self) -> int | None:
        """What becomes readable when answers have come and nobody waits for one; None if there is no such thing."""
        fd: int | None = None if self._outer is None else self._outer.fileno()
        return fd

    def watch(self, link: SlotLink) -> bool:
        """Receive what comes on a slot from now on; False if the pump itself has to watch it."""
        if self._inner is not None:
            self._inner.register(link.mine, select.EPOLLIN)
        self._links[link.mine.fileno()] = link
        return self._inner is not None

    @property
    def pending(self) -> bool:
        """True if something is to be settled."""
        return bool(self._to_settle)

    def settle_later(self, task: int, error: BaseException) -> None:
        """Have a task settled with an error by the next `settle`."""
        self._to_settle.append((task, None, error))

    def close(self, abandoned: bool = False) -> None:
        """Close the descriptors once nobody waits any more; all futures are settled.

        Args:
            abandoned: this is a forked child, where nobody does.
        """
        if not abandoned:
            self._waker.wake()
            self._turn.acquire(timeout=_CLOSE_S)  # and never released: who comes now waits as without epoll
        for owned in (self._inner, self._outer, self._waker):
            if owned is not None:
                owned.close()

    # -- who waits -----------------------------------------------------------------------------------------

    def wait_for(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Return when `future` is settled or `timeout` seconds are over, receiving meanwhile if nobody else does."""
        if self._inner is None:
            with future._condition:
                if future._state in UNDONE:
                    future._condition.wait(timeout)
            return
        deadline = None if timeout is None else CLOCK.monotonic() + timeout
        if self._receive_until(future, deadline):
            return
        # Somebody else receives, and will settle this one too, or leave it to the pump if it sees us here.
        token = object()
        self._others.add(token)
        try:
            while not self._receive_until(future, deadline):
                remaining = None if deadline is None else deadline - CLOCK.monotonic()
                with future._condition:
                    if future._state not in UNDONE or (remaining is not None and remaining <= 0):
                        return
                    future._condition.wait(remaining)
        finally:
            self._others.discard(token)

    def stand_aside(self) -> None:
        """This thread is about to wait for the end, in a signal handler perhaps that has interrupted its wait in here:
        leave that to the pump, for good."""
        if self._turn._is_owned():
            self._awaited = None
            self._show()
            self._turn._release_save()

    def _receive_until(self, future: TaskFuture[Any], deadline: float | None) -> bool:
        """Receive until `future` is settled or the time is over; False if it is another thread's turn."""
        life, poll, look = self._client.life, self._inner.poll, self._spin.look
        mask = block_in_main()
        try:
            # A signal handler, or a result that is loaded, may wait in here too, in the midst of another wait.
            outer = self._awaited if self._turn._is_owned() else None
            if not self._turn.acquire(False):
                return False
            try:
                self._awaited = future
                began = CLOCK.monotonic()
                if not self._kept:
                    self._outer.modify(self._inner, 0)
                try:
                    while future._state in UNDONE and not life.is_over:
                        events = look(poll)
                        if not events:
                            events = self._block(deadline, mask)
                            if not self._turn._is_owned():
                                return False  # a handler has waited for the end, and given up
                            if not events:
                                break
                        self._taken_at = CLOCK.monotonic()
                        try:
                            self.take(events)
                            self.settle()
                        except BaseException as error:
                            # A signal that another of the program's threads got in the main thread's place: an answer
                            # may be lost.
                            life.torn(error)
                            raise
                finally:
                    if outer is None:
                        self._give_back(began)
                    else:
                        self._show()  # what it was interrupted by may go on to wait by other means
            finally:
                if self._turn._is_owned():  # has not stood aside
                    self._awaited = outer
                    if outer is not None:
                        self._waker.wake()  # it may have been settled in here
                    self._turn.release()
        finally:
            put_back(mask)
        return True

    def _give_back(self, began: float) -> None:
        """Let the pump see answers again; or not yet, if waits follow each other quickly."""
        now = CLOCK.monotonic()
        if began - self._left_at < _KEEP_S and now - began < _LONG_S and not self._others:
            if not self._kept:
                self._kept = True
                self._look_again()
        else:
            self._show()
        self._left_at = now

    def _show(self) -> None:
        """Let the pump see answers. In this order: what it hides meanwhile it keeps."""
        self._kept = False
        if not self._outer.closed:
            self._outer.modify(self._inner, select.EPOLLIN)

    def next_look(self) -> float | None:
        """Runs in: the pump. How long it may sleep at most, so that answers kept from it do not lie for long."""
        if not self._kept:
            return None
        is_left_alone = (
            CLOCK.monotonic() - max(self._left_at, self._taken_at) > _LONG_S
        )  # by a handler that runs long
        return _LONG_S if is_left_alone else _KEEP_S

    def reclaim(self) -> None:
        """Runs in: the pump. See answers again, if nobody has waited for one lately, or who waits leaves them."""
        if not self._kept:
            return
        if self._turn.acquire(False):
            try:
                if CLOCK.monotonic() - self._left_at > _KEEP_S / 2:
                    self._show()
            finally:
                self._turn.release()
        elif (
            self._are_left(self._inner.poll(0, _EVENTS))
            or CLOCK.monotonic() - max(self._left_at, self._taken_at) > _LONG_S
        ):
            self._show()

    def _are_left(self, events: list[tuple[int, int]]) -> bool:
        """Runs in: the pump. True if who waits was to take some of these, and has taken nothing for a while."""
        if not any(fd in self._links for fd, _ in events):
            return False  # its own waker stays as it is until it looks
        now = CLOCK.monotonic()
        if self._noticed_at <= self._taken_at:
            self._noticed_at = now
        return now - self._noticed_at > _KEEP_S / 2

    def _block(self, deadline: float | None, mask: set[int] | None) -> list[tuple[int, int]]:
        """Wait in the kernel, with signals let through; nothing if the time is over."""
        remaining = -1.0  # for ever
        if deadline is not None:
            remaining = min(deadline - CLOCK.monotonic(), LONGEST_POLL_S)
            if remaining <= 0:
                return []
        events: list[tuple[int, int]]
        try:
            kept = self._kept
            if mask is not None and not kept:
                self._show()
            put_back(mask)
            soon = _KEEP_S if remaining < 0 else min(_KEEP_S, remaining)
            events = self._inner.poll(soon if kept else remaining, _EVENTS)
            if not events and kept:
                self._kept = False  # the pump need not look for the end of this
                if mask is not None:
                    self._show()
                if deadline is not None:
                    remaining = min(max(0.0, deadline - CLOCK.monotonic()), LONGEST_POLL_S)
                events = self._inner.poll(remaining, _EVENTS)
        except (OSError, ValueError) as error:
            raised_by = error.__traceback__
            if not self._inner.closed or (raised_by is not None and raised_by.tb_next is not None):
                raise  # by a handler
        finally:
            if mask is not None:
                block_in_main()
        if self._inner.closed:  # a handler has waited for the end: what came before that has been taken
            return []
        if mask is not None and not self._kept:
            self._outer.modify(self._inner, 0)
        self._spin.waited()
        return events

    @property
    def undisturbed(self) -> Any:
        """A lock: while it is held, no answer is taken."""
        return self._receiving

    def wake(self, future: TaskFuture[Any]) -> None:
        """`future` is settled, and not by who waits for it: tell."""
        if self._awaited is future:
            self._waker.wake()

    # -- answers -------------------------------------------------------------------------------------------

    def take_ready(self) -> None:
        """Runs in: the pump. Receive what has come, or leave it to who waits, for a while."""
        events = self._inner.poll(0, _EVENTS)
        if self._awaited is None or self._are_left(events):
            self.take(events)
        else:
            self._outer.modify(self._inner, 0)
            self._kept = True

    def take(self, events: list[tuple[int, int]]) -> None:
        """Receive from the slots that `events` of the inner epoll names."""
        for fd, _ in events:
            link = self._links.get(fd)
            if link is not None:
                self.take_from(link)
            elif self._turn.acquire(False):  # else it is for who waits
                self._waker.clear()
                self._turn.release()

    def take_from(self, link: SlotLink, most: int = _BATCH) -> None:
        """Receive from one slot, as far as a turn goes; after `most` datagrams epoll will say that there is more."""
        slot = link.slot
        with self._receiving:
            for _ in range(most):
                received = wire.try_receive(link.mine, MAX_DATAGRAM, SCM_MAX_FD)
                if received is None:
                    return
                self._take_answer(slot, received)
                if most is _BATCH and not self._client.dispatcher.has_given(slot):
                    return  # nothing more is expected

    def take_last(self, link: SlotLink, board: Board, event: Callable[..., Any], *arguments: Any) -> None:
        """Take all that a dead worker has sent and logged, then post its death, with no answer in between."""
        with self._receiving:
            self.take_from(link, _ALL)
            self._take_answers(link.slot, board.logged(link.slot), 0, None)
            event(*arguments)

    def take_log(self, slot: int, board: Board) -> None:
        """Take what a worker that seems to stand still has logged; nothing if it goes on meanwhile."""
        data = board.logged(slot)
        if data:
            time.sleep(SETTLE_S)
            if board.logged(slot) == data:
                with self._receiving:
                    self._take_answers(slot, data, 0, None)

    def _take_answer(self, slot: int, received: wire.Received) -> None:
        """Post what a datagram means. One that answers no task of this slot is closed and passed over."""
        client = self._client
        data, numbers, _, _ = received
        try:
            header = _messages.unpack_header(data)
        except WireError:
            close_all(numbers)
            self.strays += 1
            return
        task = header.task
        if header.kind not in _OF_ONE_TASK:
            self._take_word(slot, header, data, numbers)
        elif client.dispatcher.slot_of(task) != slot:
            close_all(numbers)
        elif type(future := client.tasks.get(task)) is ChunkFuture:
            self._take_piece(slot, future, (header, data[HEADER_BYTES:], numbers))
        else:
            self._to_settle.append((task, (header, data[HEADER_BYTES:], numbers), None))
            client.critical.post_blocked(
                client.dispatcher.finished, slot, (task,), header.micros / 1e6, header.waited
            )

    def _take_word(self, slot: int, header: Header, data: bytes, numbers: list[int]) -> None:
        """Post what a worker says that is no answer to one task."""
        client = self._client
        kind = header.kind
        if kind == _messages.BOOT_FAILED and client.dispatcher.state(slot) is State.STARTING:
            cause = payload.loads_failure(data[HEADER_BYTES:], numbers, header.spilled)
            reason = f"the pool's initializer failed: {payload.said(cause)}"
            client.critical.post_blocked(client.life.break_pool, reason, cause)
            return
        close_all(numbers)
        if kind == _messages.ANSWERS:
            self._take_answers(slot, data, HEADER_BYTES, header.task / 1e9, header.waited)
        elif kind == _messages.READY:
            client.critical.post_blocked(client.readied, slot)
        elif kind == _messages.GOING and client.board is not None and client.board.is_going(slot):
            client.critical.post_blocked(client.staffing.going, slot)
        elif kind == _messages.LEFT or (kind == _messages.LOG and client.news.logs):
            client.news.put(kind, data[HEADER_BYTES:])
            client.wake()
        elif kind != _messages.BOOT_FAILED:  # one may have come too late: another one's has broken the pool
            self.strays += 1

    def _take_piece(self, slot: int, future: ChunkFuture, answer: Answer) -> None:
        """Keep the results of a chunk; post its end, and what is left of it."""
        client = self._client
        header = answer[0]
        if header.kind in (_messages.FAILED, _messages.REFUSED):
            self._to_settle.append((header.task, answer, None))
            client.critical.post_blocked(client.dispatcher.finished, slot, (header.task,))
            return
        future.pieces.append(answer)
        if header.kind != _messages.PIECE:
            reached = future.start + sum(piece[0].micros for piece in future.pieces)
            rest = future.part(reached, 2) if future.start <= reached < future.stop else []
            # In this order: the parts are tasks before the whole is settled, which its reader waits for.
            parts = client.inboxes.enter_parts(rest, future.label)
            client.critical.post_blocked(client.inboxes.chunk_cut, slot, header.task, parts)
            self._to_settle.append((header.task, None, None))

    def _take_answers(
        self, slot: int, data: bytes, start: int, busy_s: float | None, waited: bool = False
    ) -> None:
        """Post what answers mean that come together, from the offset `start` on."""
        client = self._client
        slot_of, keep = client.dispatcher.slot_of, self._to_settle.append
        done: list[int] = []
        returned: list[int] = []
        try:
            found = _messages.split(data, start)
        except WireError:
            self.strays += 1
            return
        for kind, task, body in found:
            header = _PLAIN.get(kind)
            if header is not None:
                if slot_of(task) == slot:
                    done.append(task)
                    keep((task, (header, body, _NOTHING), None))
            elif kind == _messages.RETURNED:
                returned.append(task)
        if done:
            client.critical.post_blocked(client.dispatcher.finished, slot, done, busy_s, waited)
        if returned:
            client.critical.post_blocked(client.inboxes.returned, slot, returned)

    # -- settling ------------------------------------------------------------------------------------------

    def settle(self, until: float | None = None) -> None:
        """Settle what is due; one at least, and no more after the moment `until`, as others may add to it all the time.
        Objects are loaded here, which is user code; callbacks are the pump's."""
        due, tasks = self._to_settle, self._client.tasks
        while due:
            try:
                task, answer, error = due.popleft()
            except IndexError:
                return  # another thread was faster
            future = tasks.get(task)
            if future is None:
                if answer is not None:
                    close_all(answer[2])
            elif type(future) is ChunkFuture:
                with self._opening:  # its end and a failure of the pool may come together
                    self._open_pieces(future)
                    self._settle(task, future, answer, error)
            else:
                self._settle(task, future, answer, error)
            if until is not None and CLOCK.monotonic() >= until:
                return

    def _open_pieces(self, chunk: ChunkFuture) -> None:
        if chunk._state not in UNDONE:
            return
        for piece in chunk.pieces:
            results, failure = open_answer(*piece)
            if failure is not None:
                results = (raised(failure),) * piece[0].micros
            chunk.mixed = chunk.mixed or type(results) is tuple
            chunk.results += results or ()
        chunk.pieces.clear()

    def _settle(
        self, task: int, future: TaskFuture[Any], answer: Answer | None, error: BaseException | None
    ) -> None:
        client = self._client
        result = None
        if answer is not None:
            result, error = open_answer(*answer)
        call = future.call
        if call is not None:
            future.call = None
            if call.fds is not None:
                if answer is not None and answer[0].released and call.spilled and not call.carries_fds:
                    client.recycle(call)
                call.close()
        if future.settle(result, error):
            self._call_back(future)
        if self._awaited is future and not self._turn._is_owned():
            self._waker.wake()
        # Only now: as long as a task is in there, the pool does not end.
        client.tasks.pop(task, None)
        if not client.tasks:
            client.idle()
