"""What a server starts, drains, replaces and gives up: its decisions, pure.

It knows numbers of workers, slots and generations, and the time that it is told; no process, socket or clock. Each
method is an event ("this has happened") and returns the actions to perform, in order; `_server.loop` performs them.

Nothing here is a script of steps. After every event `_reconcile` looks at what is there and what is wanted, slot by
slot, and does what is missing. So a reload during a reload, a death during either, and a stop during all of them
need no cases of their own: what is wanted last is what comes to be.

A slot is one place among the workers, and holds at most one worker that shall stay (*fresh*: of the generation that
is wanted, and not to be retired), besides those that it takes over from or that are on their way out. In as many slots
as are wanted workers *serve*; in those beyond, they stand by, to be called as one that serves is lost. Which slots
these are changes as that happens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Union

from .states import Event, State, step

WorkerNumber = int
SlotNumber = int
Generation = int

_FIRST_PAUSE_S = 0.1
_LONGEST_BOOT_PAUSE_S = 10.0
_LONGEST_LOSS_PAUSE_S = 2.0
_YOUNG_S = 10.0  # who is lost before this age was young; twice in a row in one slot, and the slot has to wait
_DRAIN_MARGIN_S = 1.0  # how much later than it was told a draining worker may be


class StartWorker(NamedTuple):
    """Start a worker; answer with `readied` (or `stood_by`) and `exited`."""

    worker: WorkerNumber
    slot: SlotNumber
    generation: Generation
    spread: float  # by which factor its share of requests differs from the others'
    stands_by: bool = False  # it is to serve only when it is called


class CallWorker(NamedTuple):
    """Tell a worker that stands by, or is to, that it is to serve; answer with `readied`."""

    worker: WorkerNumber


class Retires(NamedTuple):
    """The worker is to be replaced, and serves until it is; `too_soon` if those that come after it will be as well."""

    worker: WorkerNumber
    why: str
    too_soon: bool = False


class DrainWorker(NamedTuple):
    """Tell the worker to take nothing new, and to be done after `grace_s` at the latest."""

    worker: WorkerNumber
    grace_s: float
    leaving: bool  # the whole server goes: nobody else will answer those who keep a connection


class EndWorker(NamedTuple):
    """Kill the worker and all that descends from it."""

    worker: WorkerNumber
    why: str
    stuck: bool = False  # so where it is stuck is worth knowing


class CloseGeneration(NamedTuple):
    """No worker of this generation is left, nor will be."""

    generation: Generation


class Started(NamedTuple):
    """For the first time as many workers serve as are wanted."""


class Reloaded(NamedTuple):
    """Every worker that serves is of this generation now."""

    generation: Generation


class Abandoned(NamedTuple):
    """A new generation does not become ready: the one before goes on."""

    generation: Generation
    why: str


class GaveUp(NamedTuple):
    """Workers fail to boot again and again, and none serves: the server ends."""

    why: str


class Over(NamedTuple):
    """The server was to stop, and no worker is left."""


Action = Union[
    StartWorker,
    CallWorker,
    Retires,
    DrainWorker,
    EndWorker,
    CloseGeneration,
    Started,
    Reloaded,
    Abandoned,
    GaveUp,
    Over,
]


class Settings(NamedTuple):
    """What the plan goes by; all times in seconds."""

    boot_timeout_s: float = 60.0
    grace_s: float = 30.0
    batch: int = 1  # how many slots change hands at a time
    boot_limit: int = 5  # failed attempts to boot workers, in a row
    max_age_s: float | None = None
    jitter: float = 0.1
    standby: int = 0  # so many more than serve stand by


class Worker:
    """One worker, as the plan knows it."""

    __slots__ = (
        "called",
        "closed",
        "deadline",
        "generation",
        "loaded",
        "number",
        "retire_at",
        "retires_early",
        "retiring",
        "slot",
        "state",
        "young_until",
    )

    def __init__(
        self, number: WorkerNumber, slot: SlotNumber, generation: Generation, deadline: float, called: bool
    ) -> None:
        self.number = number
        self.slot = slot
        self.generation = generation
        self.called = called  # it is to serve
        self.loaded = False  # it has stood by, or served
        self.state = State.BOOTING
        self.deadline: float | None = deadline  # of booting or draining
        self.retire_at: float | None = None
        self.retiring = False
        # Why it asked to as it booted: heeded once it has taken its place.
        self.retires_early: str | None = None
        self.closed = False  # it accepts nothing any more
        self.young_until = 0.0

    @property
    def stays(self) -> bool:
        """True unless it is on its way out."""
        return self.state in (State.BOOTING, State.STANDING_BY, State.SERVING)


class _Place:
    """What is known of a slot beside its workers: whether it is one in which they serve; losses in a row of young
    workers, and the pause that follows."""

    __slots__ = ("failures", "losses", "not_before", "serves")

    def __init__(self) -> None:
        self.serves = False
        self.failures = 0  # to stand by, in a row
        self.losses = 0
        self.not_before = 0.0


class Plan:
    """Decides for one server.

    Args:
        wanted: how many workers shall serve.
        settings: what it goes by.
    """

    def __init__(self, wanted: int, settings: Settings = Settings()) -> None:  # noqa: B008 - it is immutable
        self.wanted = wanted
        self.settings = settings
        self.generation: Generation = 1  # what serves, and what a failed reload falls back to
        self.coming: Generation | None = None  # what a reload is rolling out
        self.workers: dict[WorkerNumber, Worker] = {}
        self.boot_failures = 0  # attempts in a row; boots that were under way together are one
        self.stopping = False
        self._newest: Generation = 1
        self._open: set[Generation] = {1}
        self._proven: set[Generation] = set()
        self._places: dict[SlotNumber, _Place] = {}
        self._pause_until = 0.0  # no worker is started before
        self._last_of_attempt: WorkerNumber = 0  # who was started last before the last attempt failed
        self._numbers = 0
        self._started = False
        self._over = False
        self._grace_s = settings.grace_s  # of a stop
        self._leaving = True  # nobody else serves when this server has stopped
        self._now = 0.0

    # -- what may be asked -----------------------------------------------------------------------------

    @property
    def target(self) -> Generation:
        """The generation that is wanted."""
        return self.generation if self.coming is None else self.coming

    @property
    def newest(self) -> Generation:
        """The last generation that was ever wanted."""
        return self._newest

    @property
    def started(self) -> bool:
        """True once as many workers as wanted have served."""
        return self._started

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called next, or None."""
        moments = [moment for worker in self.workers.values() for moment in _moments(worker)]
        if not self.stopping:
            pauses = [self._pause_until, *(place.not_before for place in self._places.values())]
            moments += [moment for moment in pauses if moment > self._now]
        return min(moments, default=None)

    # -- events ----------------------------------------------------------------------------------------

    def begin(self, now: float) -> Sequence[Action]:
        """The server begins."""
        return self._reconcile(now)

    def tick(self, now: float) -> Sequence[Action]:
        """Time has passed."""
        actions: list[Action] = []
        for worker in list(self.workers.values()):
            if worker.deadline is not None and worker.deadline <= now:
                actions += self._overdue(worker, now)
            if worker.retire_at is not None and worker.retire_at <= now:
                worker.retire_at = None
                if not worker.retiring:
                    worker.retiring = True
                    actions.append(Retires(worker.number, self._aged(worker)))
        return [*actions, *self._reconcile(now)]

    def readied(self, number: WorkerNumber, now: float) -> Sequence[Action]:
        """The worker serves."""
        worker = self.workers.get(number)
        if worker is None or worker.state is not State.BOOTING:
            return ()
        self._booted(worker, Event.READIED, now)
        if self.settings.max_age_s is not None:
            worker.retire_at = now + self.settings.max_age_s * self.spread(number)
        self._forget_failures()
        self._proven.add(worker.generation)
        return self._heed_early(worker, now, self._reconcile(now))

    def _heed_early(self, worker: Worker, now: float, actions: list[Action]) -> Sequence[Action]:
        why, worker.retires_early = worker.retires_early, None
        if why is None:
            return actions
        self._lost(worker, now)
        return [*actions, *self.retire(worker.number, now, why)]

    def stood_by(self, number: WorkerNumber, now: float) -> Sequence[Action]:
        """The worker stands by."""
        worker = self.workers.get(number)
        if worker is None or worker.state is not State.BOOTING or worker.called:
            return ()
        self._booted(worker, Event.STOOD_BY, now)
        return self._heed_early(worker, now, self._reconcile(now))

    def _booted(self, worker: Worker, event: Event, now: float) -> None:
        worker.state = step(worker.state, event)
        worker.loaded = True
        worker.deadline = None
        worker.young_until = now + _YOUNG_S
        self._place(worker.slot).failures = 0

    def exited(self, number: WorkerNumber, now: float, why: str = "") -> Sequence[Action]:
        """The worker is dead, or has done with serving."""
        worker = self.workers.pop(number, None)
        if worker is None:
            return ()
        before = worker.state
        worker.state = step(before, Event.EXITED)
        actions: list[Action] = []
        if before is State.BOOTING:
            actions += self._boot_failed(worker, now, why)
        elif before in (State.STANDING_BY, State.SERVING):
            self._lost(worker, now)
        return [*actions, *self._reconcile(now)]

    def retire(self, number: WorkerNumber, now: float, why: str, too_large: bool = False) -> Sequence[Action]:
        """The worker has done its share (requests, memory): it is to be replaced, without a gap.

        Args:
            too_large: if it is so from its start, others are to come as slowly as if it had died.
        """
        worker = self.workers.get(number)
        if worker is not None and worker.state is State.BOOTING:
            worker.retires_early = why
        if worker is None or worker.state not in (State.STANDING_BY, State.SERVING) or worker.retiring:
            return ()
        worker.retiring = True
        if too_large:
            self._lost(worker, now)
        return [Retires(number, why, too_large and now < worker.young_until), *self._reconcile(now)]

    def closed(self, number: WorkerNumber, now: float) -> Sequence[Action]:
        """The worker, which drains, accepts nothing any more."""
        worker = self.workers.get(number)
        if worker is None:
            return ()
        worker.closed = True
        return self._reconcile(now)

    def hung(self, number: WorkerNumber, now: float, why: str) -> Sequence[Action]:
        """The worker has not moved on for longer than it may."""
        worker = self.workers.get(number)
        if worker is None or worker.state is State.ENDING:
            return ()
        return [*self._end(worker, now, why, stuck=True), *self._reconcile(now)]

    def reload(self, now: float) -> Sequence[Action]:
        """New code is wanted: a new generation, in place of whatever was coming."""
        if self.stopping:
            return ()
        self._newest += 1
        self._open.add(self._newest)
        if self.coming in self._proven:
            assert self.coming is not None
            self.generation = self.coming  # the newest of which workers have served is what one falls back to
        self.coming = self._newest
        self._forget_failures()
        return self._reconcile(now)

    def scale(self, wanted: int, now: float) -> Sequence[Action]:
        """So many workers are wanted from now on."""
        self.wanted = max(1, wanted)
        return self._reconcile(now)

    def stop(self, grace_s: float, now: float, handed_over: bool = False) -> Sequence[Action]:
        """The server is to end within `grace_s`, at once if that is 0. A later stop can only be sooner.

        Args:
            handed_over: another process serves in its place.
        """
        self._leaving = not handed_over
        self._grace_s = min(grace_s, self._grace_s) if self.stopping else grace_s
        self.stopping = True
        actions: list[Action] = []
        for worker in list(self.workers.values()):
            if grace_s <= 0:
                actions += self._end(worker, now, "the server was stopped at once")
            elif worker.state is State.DRAINING:
                until = now + grace_s + _DRAIN_MARGIN_S
                if worker.deadline is None or until < worker.deadline:
                    worker.deadline = until
                    actions.append(DrainWorker(worker.number, grace_s, self._leaving))
        return [*actions, *self._reconcile(now)]

    # -- how ---------------------------------------------------------------------------------------------

    def spread(self, number: WorkerNumber) -> float:
        """A factor within `jitter` of 1 for the worker, evenly spread: so that not all are retired at once."""
        return 1.0 + self.settings.jitter * (2.0 * (number * 0.6180339887 % 1.0) - 1.0)

    def _reconcile(self, now: float) -> list[Action]:
        """Do what is missing between what is there and what is wanted."""
        self._now = now
        if self.stopping:
            return self._wind_up(now)
        actions: list[Action] = [*self._assign(now)]
        for worker in list(self.workers.values()):
            surplus = worker.slot not in self._slots or (
                worker.called and not self._place(worker.slot).serves
            )
            if worker.stays and (surplus or self._is_superseded(worker)):
                actions += self._dismiss(worker, now)
        replacing = 0
        for slot in self._slots:
            actions += self._take_over(slot, now)
        for slot in self._slots:
            replacing += self._is_being_replaced(slot)
        for slot in self._by_age():
            wanted = self._missing(slot, now, replacing < self.settings.batch)
            if wanted is not None:
                replacing += bool(self._staying(slot))
                actions.append(self._start(slot, wanted, now))
        return [*actions, *self._conclude()]

    @property
    def _slots(self) -> range:
        return range(self.wanted + self.settings.standby)

    def _assign(self, now: float) -> Iterator[Action]:
        """Choose the slots in which workers serve: who does goes on, and who stands by is there before who has yet to
        boot."""
        serve = sorted(self._slots, key=self._rank)[: self.wanted]
        for slot, place in self._places.items():
            place.serves = place.serves and slot in serve
        for slot in serve:
            if not self._place(slot).serves:
                self._place(slot).serves = True
                for worker in self._staying(slot):
                    yield self._call(worker, now)

    def _rank(self, slot: SlotNumber) -> int:
        here, serves = self._staying(slot), self._place(slot).serves
        if serves and any(worker.loaded for worker in here):
            return 0
        if any(worker.state is State.STANDING_BY for worker in here):
            return 1  # also before one that has yet to load the application
        return (2 if here else 3) if serves else 4

    def _call(self, worker: Worker, now: float) -> CallWorker:
        worker.called = True
        if worker.state is State.STANDING_BY:
            worker.deadline = now + self.settings.boot_timeout_s
        worker.state = step(worker.state, Event.CALLED)
        return CallWorker(worker.number)

    def _staying(self, slot: SlotNumber) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.slot == slot and worker.stays]

    def _by_age(self) -> list[SlotNumber]:
        """The slots whose workers are there the longest first: each has its turn to be replaced, however soon others
        are to be again."""
        oldest: dict[SlotNumber, WorkerNumber] = {}
        for worker in self.workers.values():
            if worker.stays:
                oldest.setdefault(worker.slot, worker.number)
        return sorted(self._slots, key=lambda slot: oldest.get(slot, 0))

    def _is_fresh(self, worker: Worker) -> bool:
        return worker.generation == self.target and not worker.retiring

    def _is_superseded(self, worker: Worker) -> bool:
        """True for one that boots with code that is not wanted any more, and that is not needed to fill a gap."""
        if worker.state is not State.BOOTING or worker.generation == self.target:
            return False
        is_there = any(self._is_in_place(each) for each in self._staying(worker.slot))
        return is_there or worker.generation != self.generation

    def _is_in_place(self, worker: Worker) -> bool:
        """True for one that does what is done in its slot."""
        return worker.state is (State.SERVING if self._place(worker.slot).serves else State.STANDING_BY)

    def _is_being_replaced(self, slot: SlotNumber) -> bool:
        here = self._staying(slot)
        return len(here) > 1 and any(worker.state is State.BOOTING for worker in here)

    def _take_over(self, slot: SlotNumber, now: float) -> Iterator[Action]:
        """Once the slot's fresh worker serves, or stands by, the others may go."""
        here = self._staying(slot)
        if any(self._is_fresh(worker) and self._is_in_place(worker) for worker in here):
            for worker in here:
                if not self._is_fresh(worker):
                    yield from self._dismiss(worker, now)

    def _missing(self, slot: SlotNumber, now: float, may_replace: bool) -> Generation | None:
        """Of which generation a worker is to be started in the slot now, or None."""
        here = self._staying(slot)
        if any(self._is_fresh(worker) or worker.state is State.BOOTING for worker in here):
            return None
        if now < self._pause_until or now < self._place(slot).not_before:
            return None
        if here:
            return self.target if may_replace else None
        if not (self._place(slot).serves or self._all_serve()):
            return None  # who is to serve boots first
        # The place is empty. Until the new code has shown that it boots, it is the old that fills gaps; but for the
        # first place of all, or nobody would ever show it.
        if self.coming is None or self.coming in self._proven or self.generation not in self._proven:
            return self.target
        return self.generation

    def _start(self, slot: SlotNumber, generation: Generation, now: float) -> StartWorker:
        self._numbers += 1
        deadline = now + self.settings.boot_timeout_s
        serves = self._place(slot).serves
        self.workers[self._numbers] = Worker(self._numbers, slot, generation, deadline, serves)
        return StartWorker(self._numbers, slot, generation, self.spread(self._numbers), not serves)

    def _aged(self, worker: Worker) -> str:
        served_s = (self.settings.max_age_s or 0.0) * self.spread(worker.number)
        return f"it has served for {served_s:.1f} seconds, and its max_age is over"

    def _dismiss(self, worker: Worker, now: float) -> list[Action]:
        before = worker.state
        worker.state = step(before, Event.DISMISSED)
        worker.retire_at = None
        if worker.state is State.ENDING:
            worker.deadline = None
            return [EndWorker(worker.number, "it is not wanted any more")]
        if before in (State.STANDING_BY, State.SERVING):
            grace_s = self._grace_s if self.stopping else self.settings.grace_s
            worker.deadline = now + grace_s + _DRAIN_MARGIN_S
            return [DrainWorker(worker.number, grace_s, self.stopping and self._leaving)]
        return []

    def _end(self, worker: Worker, now: float, why: str, stuck: bool = False) -> list[Action]:
        before = worker.state
        worker.state = step(before, Event.OVERDUE)
        worker.deadline = worker.retire_at = None
        if before is State.ENDING:
            return []
        actions: list[Action] = [EndWorker(worker.number, why, stuck)]
        if before is State.BOOTING and not self.stopping:
            actions += self._boot_failed(worker, now, why)
        elif before in (State.STANDING_BY, State.SERVING):
            self._lost(worker, now)
        return actions

    def _overdue(self, worker: Worker, now: float) -> list[Action]:
        if worker.state is State.BOOTING:
            why = f"it was not ready after boot_timeout={self.settings.boot_timeout_s:g} seconds"
        else:
            why = "it had not finished when its grace was over"
        return self._end(worker, now, why, stuck=True)

    def _place(self, slot: SlotNumber) -> _Place:
        return self._places.setdefault(slot, _Place())

    def _lost(self, worker: Worker, now: float) -> None:
        """A worker that served has died, unasked, or has asked as it booted to be replaced, or is too large: the next
        one comes at once, unless this happens again and again."""
        place = self._place(worker.slot)
        if now >= worker.young_until:
            place.losses = 0
            return
        place.losses += 1
        if place.losses > 1:
            place.not_before = now + _pause_s(place.losses - 1, _LONGEST_LOSS_PAUSE_S)

    def _boot_failed(self, worker: Worker, now: float, why: str) -> list[Action]:
        if self.stopping:
            return []
        if not worker.called and worker.generation == self.generation:
            # Nobody has waited for it; nor are those to wait, or be given up, who are to serve.
            place = self._place(worker.slot)
            place.failures += 1
            place.not_before = now + _pause_s(place.failures, _LONGEST_BOOT_PAUSE_S)
            return []
        if worker.number > self._last_of_attempt:
            # Otherwise it began before anybody knew: what all of them lack for a moment has failed once.
            self.boot_failures += 1
            self._last_of_attempt = self._numbers
        limit = self.settings.boot_limit
        if worker.generation == self.coming:
            if worker.generation not in self._proven or self.boot_failures >= limit:
                return self._abandon(worker.generation, now, why)
        elif worker.generation != self.generation:
            return []
        elif self.boot_failures >= limit and self.coming is None and not self._anybody_serves():
            self.stopping = True
            self._grace_s = 0.0
            return [
                GaveUp(
                    f"workers failed to boot in {self.boot_failures} attempts, and none serves; the last: {why}"
                )
            ]
        self._pause_until = now + _pause_s(self.boot_failures, _LONGEST_BOOT_PAUSE_S)
        return []

    def _forget_failures(self) -> None:
        self.boot_failures = 0
        self._pause_until = 0.0
        self._last_of_attempt = 0

    def _abandon(self, generation: Generation, now: float, why: str) -> list[Action]:
        self.coming = None
        self._forget_failures()
        actions: list[Action] = [Abandoned(generation, why)]
        for worker in list(self.workers.values()):
            if worker.generation == generation and worker.state is State.BOOTING:
                actions += self._dismiss(worker, now)
        return actions

    def _anybody_serves(self) -> bool:
        return any(worker.state is State.SERVING for worker in self.workers.values())

    def _conclude(self) -> Iterator[Action]:
        """Tell what has come to be, and let go of generations that nobody needs any more."""
        # Whether one is to be replaced again already does not matter: under load some may always be.
        settled = {
            slot
            for slot in self._slots
            if any(
                worker.generation == self.target and self._is_in_place(worker)
                for worker in self._staying(slot)
            )
        }
        if not self._started and all(slot in settled for slot in self._slots if self._place(slot).serves):
            self._started = True
            yield Started()
        all_settled = len(settled) == len(self._slots)
        if all_settled and self.coming is not None and not any(map(self._may_accept, self.workers.values())):
            self.generation, self.coming = self.coming, None
            yield Reloaded(self.generation)
        used = {worker.generation for worker in self.workers.values()} | {self.generation, self.target}
        for generation in sorted(self._open - used):
            self._open.remove(generation)
            yield CloseGeneration(generation)

    def _all_serve(self) -> bool:
        """True if somebody serves in each slot that is for it."""
        serving = {worker.slot for worker in self.workers.values() if worker.state is State.SERVING}
        return all(slot in serving for slot in self._slots if self._place(slot).serves)

    def _may_accept(self, worker: Worker) -> bool:
        """True for one of older code that may still take connections."""
        return worker.generation != self.target and not worker.closed

    def _wind_up(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in list(self.workers.values()):
            if self._grace_s <= 0:
                actions += self._end(worker, now, "the server was stopped at once")
            elif worker.stays:
                actions += self._dismiss(worker, now)
        if not self.workers and not self._over:
            self._over = True
            actions += [CloseGeneration(generation) for generation in sorted(self._open)]
            self._open.clear()
            actions.append(Over())
        return actions

    def _check(self) -> None:
        """Assert the invariants; for the tests."""
        for slot in {worker.slot for worker in self.workers.values()}:
            here = self._staying(slot)
            # Invariant: at most one worker boots in a slot, and at most one that is to stay serves there.
            assert sum(worker.state is State.BOOTING for worker in here) <= 1 + bool(self.settings.standby)
            assert sum(self._is_fresh(worker) for worker in here) <= 1
        # Invariant: as many slots as are wanted serve, and who is there knows which.
        if not self.stopping:
            assert sum(self._place(slot).serves for slot in self._slots) == self.wanted
            for worker in self.workers.values():
                assert not worker.stays or worker.called == self._place(worker.slot).serves
        # Invariant: nobody is gone and still here; whoever boots or drains has a deadline.
        for worker in self.workers.values():
            assert worker.state is not State.GONE
            assert (worker.deadline is not None) == (worker.state in (State.BOOTING, State.DRAINING))
        # Invariant: a generation is open as long as a worker is of it, or may come to be.
        if not self._over:
            assert {worker.generation for worker in self.workers.values()} <= self._open
            assert {self.generation, self.target} <= self._open


def _pause_s(times: int, longest_s: float) -> float:
    """The pause after the last of so many times in a row: twice as long each time."""
    return min(_FIRST_PAUSE_S * 2.0 ** min(times - 1, 16), longest_s)


def _moments(worker: Worker) -> Iterator[float]:
    for moment in (worker.deadline, worker.retire_at):
        if moment is not None:
            yield moment
