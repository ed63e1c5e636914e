"""The pure core under random orders of events, against a model of kernel inboxes and workers."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdpool._dispatch import (
    Action,
    BreakPool,
    DismissWorker,
    Dispatcher,
    LoseTask,
    SendTasks,
    StartWorker,
    TakeBack,
    Where,
)
from fdpool._slots import State

SLOTS = 3
DEPTH = 4
INBOX_LIMIT = 3  # smaller than the depth, so that the model's kernel refuses now and then


class Kernel(RuleBasedStateMachine):
    """The world around a dispatcher: inboxes that outlive workers, and workers that read them or die."""

    processors = SLOTS

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(SLOTS, DEPTH, boot_limit=1000, processors=self.processors)
        self.now = 0.0
        self.ids = iter(range(1, 1_000_000))
        self.inboxes: list[deque[list[int]]] = [deque() for _ in range(SLOTS)]  # each message holds tasks
        self.workers: list[str | None] = [None] * SLOTS  # "starting", "ready", "leaving", "doomed" or none
        self.running: list[int | None] = [None] * SLOTS
        self.received: list[deque[int]] = [deque() for _ in range(SLOTS)]  # came with it, and not begun
        self.logged: list[list[int]] = [[] for _ in range(SLOTS)]  # answers written down and not sent
        self.alone: set[int] = set()
        self.pending: set[int] = set()
        self.begun: list[int] = []
        self.outcomes: dict[int, str] = {}
        self.tries_again = False  # what is lost is to be tried again
        self.refuses = False  # no worker can be asked for

    def perform(self, actions: object) -> None:
        todo: deque[Action] = deque(actions)  # type: ignore[call-overload]
        while todo:
            action = todo.popleft()
            if isinstance(action, SendTasks):
                if self.dispatcher.slot_of(action.tasks[0]) != action.slot:
                    continue  # no worker could be asked for, just before
                assert self.pending.issuperset(action.tasks), "a task that is done was sent"
                assert len(action.tasks) == 1 or self.alone.isdisjoint(action.tasks)
                assert len(action.tasks) <= self.dispatcher.batch
                if len(self.inboxes[action.slot]) >= INBOX_LIMIT:
                    todo.extend(self.dispatcher.inbox_full(action.slot, action.tasks, self.now + 1))
                else:
                    self.inboxes[action.slot].append(list(action.tasks))
            elif isinstance(action, StartWorker):
                assert self.workers[action.slot] is None, "two workers in a slot"
                if self.refuses:
                    todo.extend(self.dispatcher.refused(action.slot, self.now))
                    continue
                self.workers[action.slot] = "starting"
            elif isinstance(action, TakeBack):
                todo.extend(self.dispatcher.taken_back(action.slot, self.empty_inbox(action.slot)))
            elif isinstance(action, LoseTask) and self.tries_again:
                self.begun.remove(action.task)
                self.dispatcher.postponed(action.task, self.now + 2)
            elif isinstance(action, LoseTask):
                self.settle(action.task, "lost")
            elif isinstance(action, DismissWorker):
                assert self.workers[action.slot] == "ready", "one that is not there was told to leave"
                self.workers[action.slot] = "leaving"
            else:
                assert not isinstance(action, BreakPool)

    def empty_inbox(self, slot: int) -> list[int]:
        taken = [task for message in self.inboxes[slot] for task in message]
        self.inboxes[slot].clear()
        return taken

    def settle(self, task: int, outcome: str) -> None:
        assert task not in self.outcomes, "a task has two outcomes"
        self.pending.remove(task)
        self.outcomes[task] = outcome

    @rule(count=st.integers(1, 30), alone=st.booleans())
    def submit(self, count: int, alone: bool) -> None:
        for task in (next(self.ids) for _ in range(count)):
            self.pending.add(task)
            if alone:
                self.alone.add(task)
            self.perform(self.dispatcher.submitted(task, alone))

    @rule(slot=st.integers(0, SLOTS - 1))
    def become_ready(self, slot: int) -> None:
        if self.workers[slot] == "starting":
            self.workers[slot] = "ready"
            self.perform(self.dispatcher.readied(slot))

    @rule(slot=st.integers(0, SLOTS - 1))
    def begin(self, slot: int) -> None:
        if self.workers[slot] not in ("ready", "leaving") or self.running[slot] is not None:
            return
        if not self.received[slot] and self.inboxes[slot]:
            self.received[slot].extend(self.inboxes[slot].popleft())
        if self.received[slot]:
            task = self.received[slot].popleft()
            assert task not in self.begun, "a task has begun twice"
            self.begun.append(task)
            self.running[slot] = task
        elif self.workers[slot] == "leaving":
            self.die(slot, False)

    @rule(
        slot=st.integers(0, SLOTS - 1), at_once=st.booleans(), busy_s=st.sampled_from([0.0, 5e-6, 60e-6, 1.0])
    )
    def finish(self, slot: int, at_once: bool, busy_s: float) -> None:
        task = self.running[slot]
        if task is not None:
            self.running[slot] = None
            self.logged[slot].append(task)
            if at_once or not self.received[slot]:
                self.answer(slot, busy_s)

    def answer(self, slot: int, busy_s: float | None) -> None:
        if self.logged[slot]:
            done, self.logged[slot] = self.logged[slot], []
            for task in done:
                self.settle(task, "done")
            self.perform(self.dispatcher.finished(slot, done, busy_s))

    @rule(slot=st.integers(0, SLOTS - 1))
    def look_at_one_that_takes_long(self, slot: int) -> None:
        """What the pump does now and then: fetch its neighbours' answers, and take back what has not begun."""
        if self.running[slot] is not None:
            self.answer(slot, None)
            back = list(self.received[slot]) + self.empty_inbox(slot)
            self.received[slot].clear()
            self.perform(self.dispatcher.stalled(slot, back))
            assert self.idle() == [] or not self.dispatcher.queued
            assert self.idle() == [] or self.dispatcher.given(slot) == [self.running[slot]]

    @rule(slot=st.integers(0, SLOTS - 1))
    def cut_short(self, slot: int) -> None:
        """The task that runs has taken too long: its worker is ended, some time."""
        if self.workers[slot] in ("ready", "leaving") and self.running[slot] is not None:
            self.workers[slot] = "doomed"
            self.answer(slot, None)
            back = list(self.received[slot]) + self.empty_inbox(slot)
            self.received[slot].clear()
            self.perform(self.dispatcher.doomed(slot, back))

    @rule(slot=st.integers(0, SLOTS - 1), late=st.booleans())
    def retire(self, slot: int, late: bool) -> None:
        """A worker has done enough, or is old; `late`: it is another one's time that is over."""
        if self.workers[slot] is not None:
            generation = self.dispatcher.generation(slot) - late
            self.perform(self.dispatcher.retired(slot, generation, self.empty_inbox(slot)))

    @rule(slot=st.integers(0, SLOTS - 1), tries_again=st.booleans(), keeps=st.integers(0, 2))
    def die(self, slot: int, tries_again: bool, keeps: int = 0) -> None:
        """Its inbox `keeps` so many messages, or all, for which there is no room outside."""
        if self.workers[slot] is not None:
            self.tries_again = tries_again
            self.answer(slot, None)
            begun, self.running[slot] = self.running[slot], None
            self.workers[slot] = None
            left = [self.inboxes[slot].pop() for _ in range(min(keeps, len(self.inboxes[slot])))][::-1]
            unread = list(self.received[slot]) + self.empty_inbox(slot)
            self.received[slot].clear()
            self.inboxes[slot].extend(left)
            kept = [task for message in left for task in message]
            self.perform(self.dispatcher.exited(slot, unread, self.now, kept=kept))
            assert begun is None or tries_again or self.outcomes[begun] == "lost"
            assert begun is None or not tries_again or begun in self.dispatcher.postponed_until

    @rule(slot=st.integers(0, SLOTS - 1))
    def be_refused(self, slot: int) -> None:
        """No worker can be forked, as one was asked for."""
        if self.workers[slot] == "starting":
            self.workers[slot] = None
            unread = self.empty_inbox(slot)
            self.perform(self.dispatcher.exited(slot, unread, self.now, refused=True))

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        if not self.pending:
            return
        task = sorted(self.pending)[which % len(self.pending)]
        where = self.dispatcher.withdraw(task)
        assert where is not Where.UNKNOWN
        if where is Where.GIVEN and task not in self.begun:
            slot = self.dispatcher.slot_of(task)
            assert slot is not None
            taken = self.empty_inbox(slot)
            if task in taken:
                where = Where.QUEUED
            if task in taken:
                self.settle(task, "cancelled")
            self.perform(self.dispatcher.taken_back(slot, taken, dropping=[task] if task in taken else []))
        elif where is Where.QUEUED:
            self.settle(task, "cancelled")
        assert self.outcomes.get(task) != "cancelled" or task not in self.begun

    @rule(refuses=st.booleans())
    def refuse_workers(self, refuses: bool) -> None:
        self.refuses = refuses

    @rule(seconds=st.floats(0.01, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.dispatcher.tick(self.now))

    @rule(slot=st.integers(0, SLOTS - 1), task=st.integers(-5, -1))
    def stray_answer(self, slot: int, task: int) -> None:
        assert list(self.dispatcher.finished(slot, [task])) == []

    @precondition(lambda self: self.pending)
    @rule()
    def everything_ends(self) -> None:
        """From any state, workers that do their work bring every task to its end."""
        self.refuses = False
        for _ in range(1000):
            if not self.pending:
                break
            self.wait(5.0)
            for slot in range(SLOTS):
                self.become_ready(slot)
                self.begin(slot)
                self.finish(slot, True, 0.0)
                if self.workers[slot] == "doomed":
                    self.die(slot, False)
        assert not self.pending, "a task is stuck"

    @invariant()
    def the_dispatcher_agrees_with_itself(self) -> None:
        self.dispatcher._check()

    @invariant()
    def every_task_is_somewhere(self) -> None:
        given = {task for slot in range(SLOTS) for task in self.dispatcher.given(slot)}
        assert given | set(self.dispatcher.queued) | set(self.dispatcher.postponed_until) == self.pending

    @invariant()
    def no_task_waits_behind_a_running_one_while_a_ready_worker_is_idle(self) -> None:
        """Unless there are no processors for more, and all tasks have been short."""
        if self.idle() and self.dispatcher.queued:
            working = [slot for slot in range(SLOTS) if self.dispatcher.given(slot)]
            assert len(working) >= self.processors
            assert self.dispatcher.batch > 1
            assert next(iter(self.dispatcher.queued)) not in self.alone

    def idle(self) -> list[int]:
        return [
            slot
            for slot in range(SLOTS)
            if self.dispatcher.state(slot) is State.READY and not self.dispatcher.given(slot)
        ]


class KernelOfOneProcessor(Kernel):
    processors = 1


TestKernel = Kernel.TestCase
TestKernel.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
TestKernelOfOneProcessor = KernelOfOneProcessor.TestCase
TestKernelOfOneProcessor.settings = TestKernel.settings
