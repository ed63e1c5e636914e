"""Which task goes to which slot: the pool's decisions, pure.

It knows task ids, slot numbers and the time that it is told; no socket, thread or process. Each
method is an event ("this has happened") and returns the actions to perform, in order; `_client`
performs them. A task is in exactly one place: `queued` here, `given` to a slot, `postponed`, or done and forgotten.

    submitted ──► queued ──SendTasks──► given ──finished──► (done)
                   ▲ ▲                    │  └──exited, begun──► LoseTask, and it may be postponed
                   │ └── taken back, full, exited before it began ──┘            │
                   └──────────────────── its time has come ──────────────────────┘

A slot's inbox is the kernel's queue, so a task given may not have begun: whoever receives the datagram
first owns it. That is what makes deep inboxes harmless: an idle worker's client takes back what a busy
one has not begun (`TakeBack`), and a task that waits behind a long one never waits while a worker idles.

Where many tasks are queued that have been short so far, several travel together: as many as are done in a
fraction of a millisecond. What goes together is run in its order by one worker, or taken back.

For the same reason tasks that are short, and keep their processor busy, wake no more workers than there are processors:
else each would cost two switches between processes. One that takes longer than expected is noticed by who performs
this (`stalled`), and then what waits behind it goes to the others.
"""

import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Union

from ._slots import COOLING, LATER, LEAVING, READY, STARTING, VACANT, Event, Slot, State

TaskId = int
SlotNumber = int


class SendTasks(NamedTuple):
    """Put the tasks in the slot's inbox as one message; if there is no room, answer with `inbox_full`."""

    slot: SlotNumber
    tasks: Sequence[TaskId]


class StartWorker(NamedTuple):
    """Have a worker started for the slot; tasks may be sent to its inbox at once."""

    slot: SlotNumber
    generation: int


class TakeBack(NamedTuple):
    """Receive whatever still lies in the slot's inbox, and answer with `taken_back`."""

    slot: SlotNumber


class LoseTask(NamedTuple):
    """The task had begun when the slot's worker died: fail it."""

    slot: SlotNumber
    task: TaskId


class DismissWorker(NamedTuple):
    """Tell the slot's worker that no task follows."""

    slot: SlotNumber


class BreakPool(NamedTuple):
    """Workers die before they are ready, again and again: the pool is of no use."""

    failures: int


Action = Union[SendTasks, StartWorker, TakeBack, LoseTask, DismissWorker, BreakPool]
NOTHING: Sequence[Action] = ()

#: How much work goes in one message, in seconds. It is what a task may wait for a neighbour while another worker is
#: idle, until it is taken back; twice as much gains 3 % in a flood of tasks that do nothing.
BATCH_S = 250e-6
#: A worker that has ended no task for so long is not given others, if they were to be done soon.
STILL_S = 2e-3
#: Most tasks in one message: 10,000 that do nothing take 12 microseconds each by 32, 25 one by one.
LARGEST_BATCH = 32


class Where(Enum):
    """What `withdraw` found."""

    QUEUED = "queued"  # it was queued, and is forgotten now
    GIVEN = "given"  # it may still lie in an inbox: take that back, unless its worker has begun it
    UNKNOWN = "unknown"  # never submitted, or done


class _Seat:
    """A slot with the tasks given to its worker, oldest first; only the oldest can have begun."""

    __slots__ = ("given", "held_until", "kept", "moved_at", "open", "rank", "slot", "worked")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.given: OrderedDict[TaskId, bool] = OrderedDict()  # to whether it travels alone
        self.kept: frozenset[TaskId] = frozenset()  # which of them the last worker has left in the inbox
        self.held_until: float | None = None  # the kernel would not take more; 0.0: until a task ends
        self.rank: int | None = None
        self.worked = 0  # how often it was given tasks
        self.open = False  # its worker is ready, and the kernel takes more
        self.moved_at = 0.0  # when it last ended a task, or was given one while it had none

    @property
    def works(self) -> bool:
        """True if its worker has tasks, and would be given more."""
        return self.open and bool(self.given)

    def gets_on(self, now: float) -> bool:
        """True if its worker ends one task after the other."""
        return self.works and now - self.moved_at < STILL_S

    @property
    def waiting(self) -> int:
        """How many of the given tasks have certainly not begun, unless they end this very moment."""
        running = 1 if self.given and self.slot.state is not STARTING else 0
        return len(self.given) - running


class Dispatcher:
    """Decides for one pool.

    Args:
        max_slots: most workers at a time.
        depth: most messages given to one worker, if they were full; the running task's included.
        batching: several short tasks may go as one message.
        least: workers that are to be there even if nothing is queued, from `staffed` on.
        processors: workers that can run at a time; no more than these are woken for tasks that are short.
        clock: tells the time, in seconds.
        boot_limit: how many workers may die before they are ready, in a row, before the pool breaks.
        kill_limit: the same where the last of them was killed from outside: somebody may kill a few that are
            innocent, but an initializer for which memory never suffices must not be tried for ever.
    """

    batch: int  # most tasks in one message just now
    _room: int  # most tasks given to one worker just now

    def __init__(
        self,
        max_slots: int,
        depth: int = 16,
        boot_limit: int = 3,
        kill_limit: int = 12,
        batching: bool = True,
        least: int = 0,
        processors: int = sys.maxsize,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.queued: OrderedDict[TaskId, bool] = OrderedDict()  # to whether it travels alone
        self.full = False  # tasks are queued, as nobody has room: a new one can only be queued, too
        self.boot_failures = 0
        self.postponed_until: dict[TaskId, float] = {}  # tasks that are to be tried again, and when
        self._batching = batching
        self._least = least
        self._busy_s = BATCH_S  # what a task takes
        self._waited = 0.0  # which part of late answers is of tasks that waited rather than ran
        self._processors = processors
        self._may_pile = max_slots > processors
        self._clock = clock
        self._open = 0  # seats whose worker is ready, and the kernel takes more
        self._boot_limit = boot_limit
        self._kill_limit = kill_limit
        self._depth = depth
        self._send_together(1)
        self._seats = [_Seat(Slot(number)) for number in range(max_slots)]
        self._given_to: dict[TaskId, _Seat] = {}
        # Seats whose worker is starting or ready, by how soon a task given now would begin (see _rank):
        # picking the best seat costs the same for 2 workers and for 256.
        self._ranks: list[dict[SlotNumber, _Seat]] = [{} for _ in range(depth + 3)]
        self._last = depth + 2  # the rank of who takes no more
        self._vacant = [seat.slot.number for seat in reversed(self._seats)]
        self._paused: dict[SlotNumber, _Seat] = {}  # cooling or held: the seats that wait for the clock
        self._dismissed = False

    # -- what may be asked ---------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True if no task is queued, given or postponed."""
        return not self.queued and not self._given_to and not self.postponed_until

    @property
    def has_idle(self) -> bool:
        """True if a worker is idle, or could be started."""
        return bool(self._ranks[0]) or bool(self._vacant and not self._dismissed)

    def piles(self, slot: SlotNumber) -> bool:
        """True if the slot was given several tasks, and other workers might be idle while they wait."""
        return self._may_pile and len(self._seats[slot].given) > 1

    @property
    def live(self) -> int:
        """How many workers are starting or ready."""
        return sum(map(len, self._ranks))

    def idle_slots(self) -> list[SlotNumber]:
        """Where a ready worker has nothing to do, the one that was used last at the end."""
        return list(self._ranks[0])

    def worked(self, slot: SlotNumber) -> int:
        """How often the slot's workers were given tasks so far."""
        return self._seats[slot].worked

    def state(self, slot: SlotNumber) -> State:
        """What the slot holds."""
        return self._seats[slot].slot.state

    def generation(self, slot: SlotNumber) -> int:
        """How many workers were started for the slot."""
        return self._seats[slot].slot.generation

    def given(self, slot: SlotNumber) -> list[TaskId]:
        """The slot's tasks, oldest first."""
        return list(self._seats[slot].given)

    def has_given(self, slot: SlotNumber) -> bool:
        """True if the slot has tasks to answer."""
        return bool(self._seats[slot].given)

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called next, or None."""
        if not self._paused and not self.postponed_until:
            return None
        moments = [moment for seat in self._paused.values() if (moment := self._resumes(seat))]
        return min([*moments, *self.postponed_until.values()], default=None)

    # -- tasks ---------------------------------------------------------------------------------------

    def submitted(self, task: TaskId, alone: bool = True) -> Sequence[Action]:
        """A new task, behind all that are queued; `alone` if it may not travel with others."""
        if not self.queued:
            self.full = False
            seat = self._best_seat(alone, False)
            if seat is not None:
                # Beyond this, tasks had better gather to be sent together.
                if self.batch > 1 and len(seat.given) >= self._depth:
                    self.full = True
                else:
                    seat.given[task] = alone
                    seat.worked += 1
                    self._given_to[task] = seat
                    self._recount(seat)
                    return (SendTasks(seat.slot.number, (task,)),)
        self.queued[task] = alone
        return NOTHING if self.full else self._assign()

    def put_first(self, tasks: Sequence[TaskId]) -> None:
        """New tasks, before all that are queued, as they are the rest of one that has begun; assigned with what comes
        next."""
        for task in reversed(tasks):
            self.queued[task] = True
            self.queued.move_to_end(task, last=False)

    def assign(self) -> Sequence[Action]:
        """Give queued tasks to whoever has room."""
        return self._assign()

    def finished(
        self, slot: SlotNumber, tasks: Sequence[TaskId], busy_s: float | None = None, waited: bool = False
    ) -> Sequence[Action]:
        """The slot's worker has answered the tasks; stray answers change nothing.

        Args:
            busy_s: how long it was busy with all of them, if that is known.
            waited: most of that time it did not run.
        """
        seat = self._seats[slot]
        given = seat.given
        before = len(given)
        for task in tasks:
            if task in given:
                del given[task], self._given_to[task]
        if len(given) == before:
            return NOTHING
        if seat.held_until is None:
            self._recount(seat)
        else:
            seat.held_until = None
            self._place(seat)
        seat.moved_at = self._clock()
        if self._batching and busy_s is not None:
            self._learn(busy_s / len(tasks), waited)
        if self.queued:
            return self._assign()
        return self._relieve() if self._given_to else NOTHING

    def inbox_full(self, slot: SlotNumber, tasks: Sequence[TaskId], until: float) -> Sequence[Action]:
        """The kernel would not take the tasks: they are first in the queue again, for others, and the slot gets none
        until one of its tasks ends; or, if it has none and others fill the kernel, until the time `until`."""
        seat = self._seats[slot]
        self._requeue(seat, tasks)
        seat.held_until = 0.0 if seat.given else until
        self._place(seat)
        return self._assign()

    def withdraw(self, task: TaskId) -> Where:
        """Forget the task if it is queued; otherwise say where it is."""
        if self.postponed_until.pop(task, None) is not None:
            return Where.QUEUED
        if task in self.queued:
            del self.queued[task]
            self.full = self.full and bool(self.queued)
            return Where.QUEUED
        seat = self._given_to.get(task)
        if seat is None:
            return Where.UNKNOWN
        return Where.GIVEN

    def slot_of(self, task: TaskId) -> SlotNumber | None:
        """The slot that the task is given to, or None."""
        seat = self._given_to.get(task)
        return None if seat is None else seat.slot.number

    def taken_back(
        self, slot: SlotNumber, tasks: Iterable[TaskId], dropping: Iterable[TaskId] = ()
    ) -> Sequence[Action]:
        """These tasks were still in the slot's inbox: they are first in the queue again, or `dropping` forgotten."""
        self._seats[slot].held_until = None
        return self._taken_back(slot, tasks, dropping)

    def _taken_back(
        self, slot: SlotNumber, tasks: Iterable[TaskId], dropping: Iterable[TaskId] = ()
    ) -> Sequence[Action]:
        seat = self._seats[slot]
        self._requeue(seat, [task for task in tasks if task in seat.given])
        for task in dropping:
            self.queued.pop(task, None)
        self._place(seat)
        return self._assign()

    def stalled(self, slot: SlotNumber, tasks: Iterable[TaskId]) -> Sequence[Action]:
        """The slot's worker is in a task that takes longer than expected, and these were taken from behind it.

        It gets no other before that ends. It may be that the machine is busy, or that all tasks are long now: where it
        happens again, they soon go one by one.
        """
        self._seats[slot].held_until = 0.0
        self._reckon_with(min(4 * self._busy_s, 2 * BATCH_S))
        return self._taken_back(slot, tasks)

    # -- workers -------------------------------------------------------------------------------------

    def readied(self, slot: SlotNumber) -> Sequence[Action]:
        """The slot's worker takes tasks from now on."""
        seat = self._seats[slot]
        if seat.slot.step(Event.READIED) is READY:
            self.boot_failures = 0
        self._place(seat)
        return self._relieve()

    def exited(
        self,
        slot: SlotNumber,
        unread: Iterable[TaskId],
        now: float,
        killed: bool = False,
        kept: Iterable[TaskId] = (),
        refused: bool = False,
    ) -> Sequence[Action]:
        """The slot's worker has died; `unread` is what was taken from its inbox, in order, and `kept` what is still in
        there, for the slot's next worker; `killed` if from outside. Or it was `refused` as it was to start, for want of
        what may come again: try later, and do with the others.

        Every answer that it sent must have been told by `finished` before: what is then given, and neither unread nor
        kept, had begun.
        """
        seat = self._seats[slot]
        if seat.slot.state in (VACANT, COOLING):
            return NOTHING
        self._requeue(seat, [task for task in unread if task in seat.given])
        seat.kept = frozenset(kept).intersection(seat.given)
        lost = [task for task in seat.given if task not in seat.kept]
        for task in lost:
            del self._given_to[task], seat.given[task]
        seat.held_until = None
        failed_boot = seat.slot.state is STARTING and not refused
        self.boot_failures += failed_boot
        state = seat.slot.exited(now, LATER if refused else self.boot_failures)
        self._place(seat)
        actions: list[Action] = [LoseTask(slot, task) for task in lost]
        if state is VACANT:
            actions += self._vacated(seat)
        elif state is COOLING:
            self._paused[slot] = seat
        if failed_boot and self.boot_failures >= (self._kill_limit if killed else self._boot_limit):
            return [*actions, BreakPool(self.boot_failures)]
        return [*actions, *self._fill()]

    def staffed(self) -> Sequence[Action]:
        """Workers are missing, perhaps: start them."""
        actions: list[Action] = []
        missing = (
            min(self._least - self.live, len(self._vacant)) if self._least and not self._dismissed else 0
        )
        for _ in range(missing):
            seat = self._seats[self._vacant.pop()]
            seat.slot.step(Event.WANTED)
            self._place(seat)
            actions.append(StartWorker(seat.slot.number, seat.slot.generation))
        return actions

    def doomed(self, slot: SlotNumber, back: Iterable[TaskId] = ()) -> Sequence[Action]:
        """The slot's worker is being ended for the sake of the task that it runs; `back` are those given to it that
        it will not begin. It gets no other."""
        seat = self._seats[slot]
        if seat.slot.state in (STARTING, READY):
            seat.slot.step(Event.DISMISSED)
        return self.taken_back(slot, back)

    def retired(self, slot: SlotNumber, generation: int, back: Iterable[TaskId] = ()) -> Sequence[Action]:
        """The slot's worker is to leave when it has done what it runs; `back` is what was in its inbox."""
        seat = self._seats[slot]
        if seat.slot.generation != generation or seat.slot.state is not READY:
            return self.taken_back(slot, back)
        seat.slot.step(Event.DISMISSED)
        return [DismissWorker(slot), *self.taken_back(slot, back)]

    def postponed(self, task: TaskId, until: float) -> None:
        """A task that was lost is to be tried again, not before the time `until`."""
        self.postponed_until[task] = until

    def refused(self, slot: SlotNumber, now: float) -> Sequence[Action]:
        """No worker could be asked for, for want of what may come again: try later, and do with the others."""
        seat = self._seats[slot]
        seat.slot.exited(now, LATER)
        self._requeue(seat, [task for task in seat.given if task not in seat.kept])
        self._paused[slot] = seat
        self._place(seat)
        return self._assign()

    def tick(self, now: float) -> Sequence[Action]:
        """Time has passed: end the pauses that are over."""
        due = [task for task, until in self.postponed_until.items() if until <= now]
        for task in due:
            del self.postponed_until[task]
        self.put_first(due)
        actions: list[Action] = []
        for number, seat in list(self._paused.items()):
            moment = self._resumes(seat)
            if moment is not None and moment > now:
                continue
            del self._paused[number]
            seat.held_until = None
            if seat.slot.state is COOLING:
                seat.slot.step(Event.COOLED)
                actions += self._vacated(seat)
            self._place(seat)
        return [*actions, *self._fill()]

    def dismissed(self) -> Sequence[Action]:
        """The pool is to end: no worker is started any more, and those that are there shall leave.

        To be called when `idle`, so that nobody's inbox holds a task.
        """
        self._dismissed = True
        actions: list[Action] = []
        for seat in self._seats:
            if seat.slot.state in (STARTING, READY):
                seat.slot.step(Event.DISMISSED)
                self._place(seat)
                actions.append(DismissWorker(seat.slot.number))
        return actions

    def closed(self) -> list[TaskId]:
        """The pool is over; returns the tasks that were not done, the begun ones first."""
        tasks = [*self._given_to, *self.queued, *self.postponed_until]
        self.queued.clear()
        self.postponed_until.clear()
        self.full = False
        self._given_to.clear()
        self._paused.clear()
        self._vacant.clear()
        for seat in self._seats:
            seat.given.clear()
            seat.slot.step(Event.CLOSED)
            self._place(seat)
        return tasks

    # -- how ---------------------------------------------------------------------------------------

    def _vacated(self, seat: _Seat) -> Sequence[Action]:
        """A worker may be started for the seat at once; and is, if its inbox holds tasks that only such a one takes."""
        if not seat.given:
            self._vacant.append(seat.slot.number)
            return NOTHING
        seat.slot.step(Event.WANTED)
        self._place(seat)
        return (StartWorker(seat.slot.number, seat.slot.generation),)

    def _fill(self) -> Sequence[Action]:
        """A slot may just have become vacant: use it."""
        return [*self._assign(), *self.staffed()] or self._relieve(start=True)

    def _assign(self) -> Sequence[Action]:
        """Give queued tasks away while anyone has room: to who is idle, to a new worker, to the least laden."""
        actions: list[Action] = []
        queued = self.queued
        while queued:
            seat = self._best_seat(next(iter(queued.values())))
            if seat is None:
                break
            if seat.slot.state is VACANT:
                seat.slot.step(Event.WANTED)
                actions.append(StartWorker(seat.slot.number, seat.slot.generation))
            tasks = self._next_batch()
            given = seat.given
            seat.worked += 1
            for task, alone in tasks:
                given[task] = alone
                self._given_to[task] = seat
            self._place(seat)
            actions.append(SendTasks(seat.slot.number, [task for task, _ in tasks]))
        self.full = bool(queued)
        return actions

    def _next_batch(self) -> list[tuple[TaskId, bool]]:
        """Take what goes as one message from the queue: no more than a fair share, so that none of those is left idle
        who are to work."""
        queued = self.queued
        tasks = [queued.popitem(last=False)]
        if tasks[0][1]:
            return tasks
        for _ in range(min(self.batch, len(queued) // self._sharing()) - 1):
            task = queued.popitem(last=False)
            if task[1]:
                queued[task[0]] = True
                queued.move_to_end(task[0], last=False)
                break
            tasks.append(task)
        return tasks

    def _sharing(self) -> int:
        """How many workers the tasks are for: all, if they wait for something rather than run; else those that work, or
        as many as can. (A flood for 256 workers takes half of the time so: messages are not of seven tasks.)"""
        if self._waited >= 0.5:
            return len(self._seats)
        return min(len(self._seats), max(self._open - len(self._ranks[0]), self._processors))

    def _learn(self, busy_s: float, waited: bool) -> None:
        """Reckon with what tasks have taken of late.

        One that took far longer counts for little: it may have been kept from its processor, as one in a hundred is
        where several pools are at work. Those that are long by themselves follow each other, or `stalled` tells.
        """
        self._waited += 0.2 * (waited - self._waited)
        known = self._busy_s
        most = 4 * known + 1e-6  # no min(), which takes as long as all the rest
        most = most if most < 2 * BATCH_S else 2 * BATCH_S
        known += 0.2 * ((busy_s if busy_s < most else most) - known)
        if self._shortest_s < known <= self._longest_s:
            self._busy_s = known
        else:
            self._reckon_with(known)

    def _reckon_with(self, busy_s: float) -> None:
        """Tasks take so long: see how many may go together."""
        self._busy_s = busy_s
        batch = self.batch
        while batch > 1 and batch * busy_s > BATCH_S:
            batch //= 2
        while batch < LARGEST_BATCH and 2 * batch * busy_s <= BATCH_S:
            batch *= 2
        if batch != self.batch:
            self._send_together(batch)
            for seat in [seat for rank in self._ranks[2:] for seat in rank.values()]:  # who has none stays
                self._recount(seat)

    def _send_together(self, batch: int) -> None:
        """So many tasks may go in one message, as long as one takes longer than `_shortest_s` and no longer than
        `_longest_s`."""
        self.batch = batch
        self._room = self._depth * batch
        self._longest_s = BATCH_S / batch if batch > 1 else math.inf
        self._shortest_s = BATCH_S / (2 * batch) if batch < LARGEST_BATCH else -math.inf

    def _best_seat(self, alone: bool, start: bool = True) -> _Seat | None:
        """Where the next task begins soonest, or None if there is no room. If it needs not go `alone`, and enough
        workers are awake, one of these.

        Without `start`, None as well if a worker is to be started for it.
        """
        ranks = self._ranks
        if not alone and self._enough_are_awake():
            moving = self._least_laden()
            if moving is not None:
                return moving if moving.rank != self._last else None
        if ranks[0]:
            return next(reversed(ranks[0].values()))
        if ranks[1]:
            return next(reversed(ranks[1].values()))
        if self._vacant and not self._dismissed:
            return self._seats[self._vacant.pop()] if start else None
        for rank in ranks[2:-1]:
            if rank:
                return next(iter(rank.values()))
        return None

    def _enough_are_awake(self) -> bool:
        """True if one more worker would only take a processor from another."""
        working = self._open - len(self._ranks[0])
        return working >= self._processors and self.batch > 1 and self._waited < 0.5

    def _least_laden(self) -> _Seat | None:
        """Of those that work and get on with it; None if none of the first few does."""
        now = self._clock()
        seats = itertools.chain.from_iterable(map(dict.values, self._ranks[2:]))
        for seat in itertools.islice((seat for seat in seats if seat.works), 2 * self._processors):
            if seat.gets_on(now):
                return seat
        return None

    def _relieve(self, start: bool = False) -> Sequence[Action]:
        """Nothing is queued: if a worker is idle while another has tasks waiting, take those back; with `start`, also
        if one could be started, unless those that were started last did not get ready."""
        startable = start and self._vacant and not self._dismissed and not self.boot_failures
        if not self._given_to or not (self._ranks[0] or startable) or self.queued:
            return NOTHING
        lazy, now = self._enough_are_awake(), self._clock()
        # Rank 2 is passed over where nobody in it has a task waiting, or 256 busy workers would be looked at.
        for rank in reversed(self._ranks[2 if self.batch > 1 else 3 :]):
            for seat in rank.values():
                if seat.waiting and not (lazy and seat.gets_on(now)):
                    return [TakeBack(seat.slot.number)]
        return NOTHING

    def _requeue(self, seat: _Seat, tasks: Sequence[TaskId]) -> None:
        seat.kept = seat.kept.difference(tasks) if seat.kept else seat.kept
        for task in reversed(tasks):
            del self._given_to[task]
            self.queued[task] = seat.given.pop(task)
            self.queued.move_to_end(task, last=False)

    def _place(self, seat: _Seat) -> None:
        """What the seat holds has changed, or whether it is held: put it where its rank says."""
        is_open = seat.slot.state is READY and seat.held_until is None
        if is_open is not seat.open:
            seat.open = is_open
            self._open += 1 if is_open else -1
            seat.moved_at = self._clock()
        if seat.held_until:
            self._paused[seat.slot.number] = seat
        self._recount(seat)

    def _recount(self, seat: _Seat) -> None:
        """The seat's tasks have changed, or the size of a message, and nothing else: put it where its rank says."""
        before, rank = seat.rank, self._rank(seat)
        if rank == before:
            return
        number = seat.slot.number
        if before is not None:
            del self._ranks[before][number]
            if before == 0:
                seat.moved_at = self._clock()
        if rank is not None:
            self._ranks[rank][number] = seat
        seat.rank = rank

    def _rank(self, seat: _Seat) -> int | None:
        """0: ready and idle; 1: starting and idle; 2 + n: n full messages wait already; last: takes no more."""
        given = len(seat.given)
        if seat.open:
            if not given:
                return 0
            return 2 + (given - 1) // self.batch if given < self._room else self._last
        if seat.slot.state is STARTING and seat.held_until is None and given < self._room:
            return 2 + given // self.batch if given else 1
        return self._last if seat.slot.state in (READY, STARTING) else None

    def _resumes(self, seat: _Seat) -> float | None:
        return seat.slot.not_before if seat.slot.state is COOLING else seat.held_until

    def _check(self) -> None:
        """Assert the invariants; for the tests."""
        # Invariant: a task is in exactly one place.
        given = [task for seat in self._seats for task in seat.given]
        assert len(given) == len(set(given)) == len(self._given_to)
        assert not set(given) & set(self.queued)
        assert not (set(given) | set(self.queued)) & set(self.postponed_until)
        assert all(task in self._given_to[task].given for task in given)
        # Invariant: a seat stands in its own rank and in no other; only live seats have tasks, but for what was left in
        # an inbox.
        for seat in self._seats:
            number = seat.slot.number
            assert seat.open == (seat.slot.state is READY and seat.held_until is None)
            assert seat.rank == self._rank(seat)
            assert [i for i, rank in enumerate(self._ranks) if number in rank] == (
                [] if seat.rank is None else [seat.rank]
            )
            assert not seat.given or seat.slot.state in (STARTING, READY, LEAVING, COOLING)
            assert seat.slot.state is not COOLING or seat.kept.issuperset(seat.given)
        # Invariant: as many are open as are counted.
        assert self._open == sum(seat.open for seat in self._seats)
        # Invariant: exactly the vacant slots can be filled, once each.
        vacant = [s.slot.number for s in self._seats if s.slot.state is VACANT]
        assert sorted(self._vacant) == sorted(vacant)
