"""The client's side of one pool: it owns the tasks and the slots, and performs what `_dispatch` decides.

How a task travels, and who may wait where:

    submit    any thread     enters the task and posts "submitted" (`_critical`): whoever gets the lock asks
                             `_dispatch` and performs its answer. Nothing there waits: sends are MSG_DONTWAIT.
    answers   who waits      `_receiver` takes answers, posts what they mean, and settles futures with the lock
              or the pump    free, as loading a result is user code.
    the rest  the pump       `_pump` waits for deaths and deadlines, and calls back, which is user code, too.
    the end   the pump       `_lifetime`: in phases, each entered when the one before has nothing left to do.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from . import _budget, _dispatch, _messages, _process, _spill, wire
from ._answers import task_lost
from ._board import Board
from ._clock import CLOCK
from ._control import ControlLink
from ._critical import Critical, block_in_main, put_back
from ._dispatch import Action, Dispatcher, Where
from ._inboxes import RETRY_S, Inboxes
from ._lifetime import FORKED, NEW, OVER, SERVING, Lifetime
from ._limits import Limits
from ._links import SlotLink
from ._news import News
from ._options import TaskOptions
from ._pump import Pump
from ._receiver import Receiver
from ._slots import State
from ._staffing import Staff, Staffing
from ._supervision import Setup, Supervision
from ._tasks import ChunkFuture, CutShort, TaskFuture
from .payload import Payload
from .stats import PoolStats, PoolWorkerStats

T = TypeVar("T")

#: Most tasks given to one worker, the running one included: enough that a worker need not wait for the
#: client between short tasks.
INBOX_DEPTH = 16

#: Most bytes of a call that travels with others, so that the largest batch fits into a message.
_LARGEST_IN_BATCH = 2048

# What kills from outside; a process's own faults have other signals.
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
_REPORT_S = 1.0  # how long the report of a worker's start may come after its first answer
_SHORT_S = 20.0  # how long a pool whose last worker has died waits for what another one needs
_ROOM_S = 10.0  # how long who submits waits for a task to let go of descriptors


class Client:
    """One pool's client side.

    Args:
        max_workers: how many slots.
        processors: that this process may use.
        setup: how workers come to be; what it holds is owned.
        staff: how many workers there are, and for how long.
    """

    def __init__(self, max_workers: int, processors: int, setup: Setup, staff: Staff) -> None:
        self.max_workers = max_workers
        self.life = Lifetime(self)
        self.supervision = Supervision(self, setup)
        self.tasks: dict[int, TaskFuture[Any]] = {}  # everything submitted and not settled
        self.links: dict[int, SlotLink] = {}
        self.board: Board | None = None
        max_tasks = setup.recycling.max_tasks
        depth = INBOX_DEPTH if max_tasks is None else min(INBOX_DEPTH, max_tasks)
        # A worker that leaves after so many tasks must not have received more.
        self.dispatcher = Dispatcher(
            max_workers,
            depth,
            batching=max_tasks is None,
            least=staff.min_workers,
            processors=processors,
            clock=CLOCK.monotonic,
        )
        self.inboxes = Inboxes(self)
        self.limits = Limits(self)
        self.staffing = Staffing(self, staff)
        self.news = News(logs=setup.log_level is not None)
        # Since when there is no worker, and none can be had: None as long as there is one, for ever before the first.
        self._short_since: float | None = -math.inf
        self.recycled = 0  # workers that have left, or were told to
        self.lost_workers = 0
        self.retried = 0
        self.newest = 0  # task
        self.critical = Critical(self.perform, self.life.torn)
        self.new_id = itertools.count(1).__next__
        # Tokens of shared objects that are closed, and that tasks still to come may open again.
        self._forgotten: set[bytes] = set()
        self._files_due: float | None = None  # when the pump looks for memory files that nobody wants
        self.pump: Pump | None = None  # once it serves
        self._performers: dict[type, Callable[[Any], Sequence[Action]]] = {
            _dispatch.SendTasks: self.inboxes.send,
            _dispatch.StartWorker: self._start_worker,
            _dispatch.TakeBack: self._take_back,
            _dispatch.LoseTask: self._lose_task,
            _dispatch.DismissWorker: self._dismiss_worker,
            _dispatch.BreakPool: self._break_pool,
        }
        _process.register(self.life)

    # -- for Pool and its futures ----------------------------------------------------------------------

    @property
    def control(self) -> ControlLink | None:
        """The link to the supervisor; None before there is one."""
        return self.supervision.control

    @property
    def receiver(self) -> Receiver:
        """Of a pool that serves."""
        assert self.pump is not None
        return self.pump.receiver

    def worker_pids(self) -> list[int]:
        """Of the workers that have been reported, and of those that work already: their report is on its way."""
        if not (self.life.phase in (OVER, FORKED) or self.critical.is_mine):
            with self.critical:
                self.critical.handle_posted()  # its first answer may be told before this is looked at: that it is ready
        deadline = CLOCK.monotonic() + _REPORT_S
        links = list(self.links.values())
        while CLOCK.monotonic() < deadline and any(
            link.starting and (self.dispatcher.state(link.slot) is State.READY or self.running(link.slot)[0])
            for link in links
        ):
            time.sleep(0.001)
        return [pid for link in links if (pid := link.pid) is not None]

    def stats(self) -> PoolStats:
        """What there is now; of a pool that is over, or was forked, what can be said."""
        if self.life.phase in (OVER, FORKED) or self.critical.is_mine:
            return self._stats(())
        with self.critical:
            self.critical.handle_posted()
            slots = sorted(slot for slot, link in self.links.items() if link.alive)
            return self._stats([self._worker_stats(slot) for slot in slots])

    def _worker_stats(self, slot: int) -> PoolWorkerStats:
        running, began = self.running(slot)
        record = self.tasks.get(running)
        given = self.dispatcher.given(slot)
        return PoolWorkerStats(
            slot,
            self.dispatcher.generation(slot),
            self.links[slot].pid,
            self.dispatcher.state(slot).value,
            None if record is None else record.label,
            0.0 if record is None else max(0.0, CLOCK.monotonic() - began),
            len(given) - (running in given),
        )

    def _stats(self, workers: Sequence[PoolWorkerStats]) -> PoolStats:
        return PoolStats(
            tuple(workers),
            submitted=self.newest,
            unsettled=len(self.tasks),
            queued=len(self.dispatcher.queued),
            postponed=len(self.dispatcher.postponed_until),
            retried=self.retried,
            lost_workers=self.lost_workers,
            recycled=self.recycled,
            supervisor_restarts=self.supervision.restarts,
            left=self.news.left,
            strays=self.news.strays + (0 if self.pump is None else self.pump.receiver.strays),
        )

    def begin(self) -> None:
        """Start the pool if it is new.

        To be called before anything is opened for a task, payload, pipe or leash: a supervisor that is forked from this
        process, and every worker, would keep it open for as long as the pool lives.

        Raises:
            ForkedPool, PoolShutDown, PoolBroken: the pool takes no tasks.
        """
        phase = self.life.phase
        if phase is SERVING:
            return  # whatever makes it of no use has it leave that phase
        self.life.check_usable()
        if phase is NEW:
            mask = block_in_main()
            try:
                self.life.begin(mask)
            finally:
                put_back(mask)

    def submit(self, call: Payload, label: str, future: TaskFuture[T]) -> TaskFuture[T]:
        """Take over the payload of a call, after `begin`; returns `future`, which is its own from now on.

        It never waits, so a finalizer or a signal handler may call it too.

        Raises:
            ForkedPool, PoolShutDown, PoolBroken: the pool takes no tasks; the payload is closed.
        """
        task = self.newest = self.new_id()
        future._client = self
        future._task = task
        future.call = call
        future.label = label
        options = future.options
        dispatcher = self.dispatcher
        alone = (
            call.fds is not None
            or len(call.body) > _LARGEST_IN_BATCH
            or options is not None
            or type(future) is ChunkFuture
        )
        if dispatcher.full and options is None and self.life.phase is SERVING:
            # Nothing to decide: it can only be queued, and whoever next gets the lock will do so. Looked at
            # again afterwards, as it may just have been too late for who had the lock.
            self.tasks[task] = future
            self.critical.leave((dispatcher.submitted, (task, alone)))
            if not dispatcher.full:
                self.critical.drain()
            if self.life.phase is not SERVING and self.withdraw(task):
                self.life.check_usable()
            return future
        mask = block_in_main()  # a task that Ctrl-C left entered and not posted would never end
        try:
            # Entered first, checked second: who ends the pool sets the phase first and looks for tasks second,
            # so one of the two always sees the other.
            self.tasks[task] = future
            if self.life.phase is not SERVING:
                try:
                    self.life.check_usable()
                except BaseException:
                    self.tasks.pop(task, None)
                    call.close()
                    self.wake()
                    raise
            self.critical.post_blocked(dispatcher.submitted, task, alone)
            if options is not None and options.queue_timeout is not None:
                self.critical.post_blocked(self.limits.submitted, task, options.queue_timeout)
        finally:
            put_back(mask)
        return future

    def wait_for_descriptors(self, label: str, near: bool = False) -> bool:
        """Wait until a task has let go of descriptors that it holds here; False if none holds any.

        Args:
            near: there are some, which are kept for the rest of the program.

        Raises:
            DescriptorsExhausted: none did for so long, or this thread must not wait: it runs callbacks or a finalizer.
        """
        holders = list(filter(_holds_descriptors, list(self.tasks.values())))
        if not holders:
            return False
        pump = self.pump
        may_wait = pump is not None and not pump.is_current and not self.critical.is_mine
        deadline = CLOCK.monotonic() + (_ROOM_S if may_wait else 0.0)
        while all(map(_holds_descriptors, holders)):
            if CLOCK.monotonic() >= deadline:
                held = sum(map(_holds_descriptors, list(self.tasks.values())))
                raise _budget.exhausted(label, held, _ROOM_S if may_wait else 0.0, near)
            self.wait_for(holders[0], 0.01)
        return True

    def withdraw(self, task: int) -> bool:
        """Forget a task that no worker has begun, wherever it is; True if so, and then it will never run."""
        if self.life.phase is FORKED or self.critical.is_mine:
            return False
        with self.critical:
            self.critical.handle_posted()
            record = self.tasks.pop(task, None) if self.take_out(task) else None
        if record is None:
            return False
        call, record.call = record.call, None
        if call is not None:
            call.close()
        if self.life.phase is not SERVING:
            self.wake()  # it may have been the last that the end waited for
        return True

    def take_out(self, task: int) -> bool:
        """Make sure that a task that has not begun never will: True if so. Lock held."""
        where = self.dispatcher.withdraw(task)
        if where is Where.GIVEN and not self.is_begun(task):
            slot = self.dispatcher.slot_of(task)
            assert slot is not None
            self.perform(self.inboxes.fetch(slot, task))
            return self.dispatcher.slot_of(task) != slot
        return where is Where.QUEUED

    def tasks_with(self, options: TaskOptions | None) -> list[TaskFuture[Any]]:
        """Those of the unsettled that were submitted with this very object, oldest first; none in a forked child, where
        nobody would settle them."""
        if self.life.phase is FORKED:
            return []
        return [future for future in list(self.tasks.values()) if future.options is options]

    def terminate(self, task: int, grace_s: float) -> None:
        """Interrupt the task that a worker runs; if it has not ended after `grace_s`, end that worker.

        Again only for a shorter grace.
        """
        if self.life.phase is FORKED or self.critical.is_mine:
            return
        with self.critical:
            self.critical.handle_posted()
            record = self.tasks.get(task)
            if record is None:
                return
            # One whose worker is being ended as it took too much is not to be tried again after that.
            if record.cut_short is not CutShort.TERMINATED or grace_s < record.grace_s:
                record.cut_short = CutShort.TERMINATED
                record.grace_s = grace_s
                self.limits.terminate(task, grace_s)

    def stop(self, task: int) -> bool:
        """Have the worker that runs the task, or is about to, stop it, which commands know how to do; False if there is
        none."""
        if self.life.phase is FORKED or self.critical.is_mine or self.board is None:
            return False
        with self.critical:
            self.critical.handle_posted()
            if self.dispatcher.slot_of(task) is None:
                return False
            self.perform(self.limits.stop(task))
            return True

    def has_begun(self, task: int) -> bool:
        """True if a worker has begun the task, and its outcome is not known yet."""
        if self.life.phase is FORKED or self.critical.is_mine:
            return False
        with self.critical:
            self.critical.handle_posted()
            return self.is_begun(task)

    def is_begun(self, task: int) -> bool:
        """As `has_begun`. Lock held."""
        slot = self.dispatcher.slot_of(task)
        if slot is None or self.board is None:
            return False
        begun = self.board.begun(slot)
        if begun == task:
            return True
        # A worker runs its tasks in this order, and sends the answers of some together.
        given = self.dispatcher.given(slot)
        return begun in given and given.index(task) < given.index(begun)

    def wait_for(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Help to receive until `future` is settled or `timeout` seconds are over; may return early.

        Raises:
            ForkedPool: nobody would ever settle it here.
        """
        if self.life.phase is FORKED:
            self.life.check_usable()
        pump = self.pump
        if pump is None or self.critical.is_mine or pump.is_current:
            return
        pump.receiver.wait_for(future, timeout)

    def wake_waiter(self, future: TaskFuture[Any]) -> None:
        """`future` was settled by others than the pool: who receives for its sake shall see it."""
        if self.pump is not None:
            self.pump.receiver.wake(future)

    def idle(self) -> None:
        """Every task is settled: the pump must know if the end waits for that."""
        if self.life.phase is not SERVING:
            self.wake()
        elif self._forgotten:  # a task that was still to come may have opened them again
            tokens, self._forgotten = self._forgotten, set()
            for token in tokens:
                self.critical.post(self._tell_to_forget, token)

    def recycle(self, call: Payload) -> None:
        """Keep the memory file of a call, which nobody maps any more, for the next one."""
        if call.fds is None or not call.fds.numbers:
            return
        mapping, call.mapping = call.mapping, None
        # The pump is to close it after a while: it must know, if it is not to look for such a file in any case. To wake
        # it for each took 70 of the 300 microseconds of a task with 256 KiB.
        if _spill.recycle(call.fds.numbers.pop(0), mapping) and self._files_due is None:
            self.wake()

    def forget(self, token: bytes) -> None:
        """Tell the workers that no task takes a shared object any more. Never waits, for finalizers."""
        if self.life.phase is SERVING:
            if self.tasks:
                self._forgotten.add(token)
            self.critical.post(self._tell_to_forget, token)

    def _tell_to_forget(self, token: bytes) -> Sequence[Action]:
        header = _messages.pack_header(_messages.FORGET, 0, len(token))
        for link in self.links.values():
            try:
                wire.try_send(link.mine, (header, token))
            except OSError:
                pass  # it will be pushed out by others, or go with the worker
        return ()

    # -- performing: each action returns what follows from it. The caller holds the lock --------------------

    def perform(self, actions: Sequence[Action]) -> None:
        performers = self._performers
        while actions:
            follow: list[Action] = []
            for action in actions:
                follow += performers[type(action)](action)
            actions = follow

    def _start_worker(self, action: _dispatch.StartWorker) -> Sequence[Action]:
        slot, generation = action
        link = self.links.get(slot)
        try:
            if link is None:
                link = self._new_link(slot)
            link.starting = True
            assert self.board is not None
            self.board.clear(slot)
            self.tell(_messages.StartWorker(slot, generation), [link.theirs.fileno()])
        except OSError as error:
            if link is not None:
                link.starting = False
            others = any(other.alive for other in self.links.values())
            if not others and (error.errno not in _budget.FULL or not self._waits_for_room()):
                return self.life.break_pool(f"worker {slot} cannot be asked for: {error}")
            self.wake()  # the pump must learn when to try again
            return self.dispatcher.refused(slot, CLOCK.monotonic())
        return ()

    def _waits_for_room(self) -> bool:
        """There is no worker, and none can be had now: True if that is to be tried again. What was enough for a worker
        once may be so again, but not for ever does somebody wait for it."""
        now = CLOCK.monotonic()
        if self._short_since is None:
            self._short_since = now
        return now - self._short_since <= _SHORT_S

    def _new_link(self, slot: int) -> SlotLink:
        """Make what is held of a slot, and watch it.

        Raises:
            OSError: no descriptor is left, or nothing more can be watched; nothing was made.
        """
        assert self.pump is not None
        link = SlotLink(slot)
        try:
            self.pump.watch(link)
        except BaseException:
            link.close()
            raise
        self.links[slot] = link
        return link

    def _take_back(self, action: _dispatch.TakeBack) -> Sequence[Action]:
        found, _ = self.inboxes.emptied(action.slot, partly=True)
        return self.dispatcher.taken_back(action.slot, found)

    def _lose_task(self, action: _dispatch.LoseTask) -> Sequence[Action]:
        slot, task = action
        record = self.tasks.get(task)
        if record is None:
            return ()
        begun = self.board is not None and self.board.begun(slot) == task
        error = task_lost(record, slot, self.links[slot].last_exit, begun)
        if type(record) is ChunkFuture and begun:
            assert self.board is not None
            claimed = self.board.claimed(slot)
            if record.start <= claimed < record.stop:
                self.inboxes.queue_first(self.inboxes.enter_parts(record.part(claimed, 2), record.label))
                self.fail(task, error)
                return self.dispatcher.assign()
        if not self._try_again(task, record, error):
            self.fail(task, error)
        return ()

    def _try_again(self, task: int, record: TaskFuture[Any], error: BaseException) -> bool:
        """Have a lost task tried again, if it may be."""
        if record.call is None or record.options is None or not record.may_retry or record.done():
            return False
        if record.cut_short is CutShort.TERMINATED or self.life.dropping or not self.life.runs_tasks:
            return False
        self.retried += 1
        record.attempts = (*record.attempts, error)
        record.cut_short = None
        self.dispatcher.postponed(task, CLOCK.monotonic() + record.options.delay_s(len(record.attempts)))
        self.wake()
        return True

    def _dismiss_worker(self, action: _dispatch.DismissWorker) -> Sequence[Action]:
        return self.tell_to_leave(action.slot, self.dispatcher.generation(action.slot))

    def tell_to_leave(self, slot: int, generation: int) -> Sequence[Action]:
        """Event: the slot's worker is to hear that no task follows; once there is room for that in its inbox."""
        if self.dispatcher.generation(slot) != generation or self.dispatcher.state(slot) is not State.LEAVING:
            return ()
        try:
            sent = wire.try_send(self.links[slot].mine, (_messages.pack_header(_messages.LEAVE),))
        except OSError as error:
            if error.errno not in _messages.MAY_YET_LAND:
                raise
            sent = False
        if not sent:
            self.limits.at(CLOCK.monotonic() + RETRY_S, self.tell_to_leave, slot, generation)
        return ()

    def _break_pool(self, action: _dispatch.BreakPool) -> Sequence[Action]:
        how_many, last = action.failures, self.life.last_death
        return self.life.break_pool(
            f"{how_many} workers in a row died before they were ready; the last one {last}"
        )

    def _was_cut_short(self, slot: int) -> bool:
        return any(
            (record := self.tasks.get(task)) is not None and record.cut_short is not None
            for task in self.dispatcher.given(slot)
        )

    def readied(self, slot: int) -> Sequence[Action]:
        """Event: the slot's worker takes tasks from now on."""
        actions = self.dispatcher.readied(slot)
        self.staffing.readied(slot)
        self._short_since = None
        return actions

    def worker_exited(self, slot: int, unread: Sequence[int] = ()) -> Sequence[Action]:
        """Event: the slot's worker is dead, and every answer that it had sent has been posted before.

        What it has not received (`unread` was taken from its inbox already) is for others, unless there is no room here
        for its descriptors: that is left to the slot's next worker.
        """
        taken, is_all = self.inboxes.emptied(slot)
        unread = [*unread, *taken]
        kept: list[int] = []
        if not is_all:
            try:
                kept = self.inboxes.left_in(slot)
            except OSError:
                # It is safe where it is, and others will let go of descriptors, perhaps.
                self.limits.at(CLOCK.monotonic() + RETRY_S, self.worker_exited, slot, unread)
                return ()
        status, refused = self.links[slot].last_exit.status, self.links[slot].last_exit.refused
        if not refused:
            self.lost_workers += self.dispatcher.state(slot) is not State.LEAVING or self._was_cut_short(slot)
        elif all(link.pid is None for link in self.links.values()):  # those that start may be refused, too
            refused = self._waits_for_room()
        killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) in _OUTSIDE
        self.wake()  # the slot may be paused now, and the pump must know until when
        self.inboxes.forget(slot)
        unread = self.inboxes.received_not_begun(slot, unread + kept) + unread
        if kept:
            self.inboxes.watch(slot)
        return self.dispatcher.exited(slot, unread, CLOCK.monotonic(), killed, kept, refused)

    def fail(self, task: int, error: BaseException) -> None:
        """Have the pump settle a task with an error, and close what the task still holds."""
        record = self.tasks.get(task)
        if record is not None and self.pump is not None:
            call, record.call = record.call, None  # first: who waits may just settle it
            if call is not None:
                call.close()
            self.pump.receiver.settle_later(task, error)
            self.wake()

    # -- what its parts ask for ----------------------------------------------------------------------------

    def end_worker(self, slot: int, grace_s: float, stacks: bool = False) -> None:
        """Have the slot's worker ended, with all that descends from it; its `stacks` taken first. Lock held."""
        self.tell(_messages.EndWorker(slot, self.dispatcher.generation(slot), grace_s, stacks))

    def running(self, slot: int) -> tuple[int, float]:
        """The task that the slot's worker is in, and since when; (0, 0.0) for none."""
        return (0, 0.0) if self.board is None else self.board.running(slot)

    def wanted_at(self, *moments: float | None) -> float | None:
        """When the pump is wanted next, whatever comes or not: at these moments, among others. Lock held."""
        self._files_due = None  # first: a file that is kept just now is either seen here, or wakes the pump
        self._files_due = _spill.expires_at()
        flushed = self.supervision.flush()
        moments += (self.life.overdue_at, self.inboxes.looks_at, self._files_due)
        due = [moment for moment in moments if moment is not None]
        if not flushed:
            due.append(CLOCK.monotonic() + RETRY_S)
        return min(due) if due else None

    def close(self, abandoned: bool = False) -> None:
        """Close everything. Safe to call again.

        Args:
            abandoned: this is a forked child of the client, without its threads.
        """
        if self.pump is not None:
            self.pump.close(abandoned)
            _spill.expire()
        if abandoned:
            for record in self.tasks.values():
                if record.call is not None:
                    record.call.close()
        for owned in (*self.links.values(), self.supervision, self.board):
            if owned is not None:
                owned.close()
        self.links.clear()

    def tell(self, message: _messages.ToSupervisor, numbers: Sequence[int] = ()) -> None:
        """Send a control message; the pump sends what cannot go at once. Lock held."""
        if not self.supervision.tell(message, numbers):
            self.wake()

    def wake(self) -> None:
        """Make the pump look again; from any thread."""
        if self.pump is not None:
            self.pump.wake()


def _holds_descriptors(record: TaskFuture[Any]) -> bool:
    call = record.call
    return call is not None and call.fds is not None and bool(call.fds.numbers) and not record.done()
