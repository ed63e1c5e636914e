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
    SendTask,
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

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(SLOTS, DEPTH, boot_limit=1000)
        self.now = 0.0
        self.ids = iter(range(1, 1_000_000))
        self.inboxes: list[deque[int]] = [deque() for _ in range(SLOTS)]
        self.workers: list[str | None] = [None] * SLOTS  # "starting", "ready" or none
        self.running: list[int | None] = [None] * SLOTS
        self.pending: set[int] = set()
        self.begun: list[int] = []
        self.outcomes: dict[int, str] = {}

    def perform(self, actions: object) -> None:
        todo: deque[Action] = deque(actions)  # type: ignore[call-overload]
        while todo:
            action = todo.popleft()
            if isinstance(action, SendTask):
                assert action.task in self.pending, "a task that is done was sent"
                if len(self.inboxes[action.slot]) >= INBOX_LIMIT:
                    todo.extend(self.dispatcher.inbox_full(action.slot, action.task, self.now + 1))
                else:
                    self.inboxes[action.slot].append(action.task)
            elif isinstance(action, StartWorker):
                assert self.workers[action.slot] is None, "two workers in a slot"
                self.workers[action.slot] = "starting"
            elif isinstance(action, TakeBack):
                taken = list(self.inboxes[action.slot])
                self.inboxes[action.slot].clear()
                todo.extend(self.dispatcher.taken_back(action.slot, taken))
            elif isinstance(action, LoseTask):
                self.settle(action.task, "lost")
            else:
                assert not isinstance(action, (BreakPool, DismissWorker))

    def settle(self, task: int, outcome: str) -> None:
        assert task not in self.outcomes, "a task has two outcomes"
        self.pending.remove(task)
        self.outcomes[task] = outcome

    @rule(count=st.integers(1, 6))
    def submit(self, count: int) -> None:
        for task in (next(self.ids) for _ in range(count)):
            self.pending.add(task)
            self.perform(self.dispatcher.submitted(task))

    @rule(slot=st.integers(0, SLOTS - 1))
    def become_ready(self, slot: int) -> None:
        if self.workers[slot] == "starting":
            self.workers[slot] = "ready"
            self.perform(self.dispatcher.readied(slot))

    @rule(slot=st.integers(0, SLOTS - 1))
    def begin(self, slot: int) -> None:
        if self.workers[slot] == "ready" and self.running[slot] is None and self.inboxes[slot]:
            task = self.inboxes[slot].popleft()
            assert task not in self.begun, "a task has begun twice"
            self.begun.append(task)
            self.running[slot] = task

    @rule(slot=st.integers(0, SLOTS - 1))
    def finish(self, slot: int) -> None:
        task = self.running[slot]
        if task is not None:
            self.running[slot] = None
            self.settle(task, "done")
            self.perform(self.dispatcher.finished(slot, task))

    @rule(slot=st.integers(0, SLOTS - 1))
    def die(self, slot: int) -> None:
        if self.workers[slot] is not None:
            begun, self.running[slot] = self.running[slot], None
            self.workers[slot] = None
            unread = list(self.inboxes[slot])
            self.inboxes[slot].clear()
            self.perform(self.dispatcher.exited(slot, unread, self.now))
            assert begun is None or self.outcomes[begun] == "lost"

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        if not self.pending:
            return
        task = sorted(self.pending)[which % len(self.pending)]
        where = self.dispatcher.withdraw(task)
        assert where is not Where.UNKNOWN
        if where is Where.INBOX:
            slot = self.dispatcher.slot_of(task)
            assert slot is not None
            taken = list(self.inboxes[slot])
            self.inboxes[slot].clear()
            if task in taken:
                where = Where.QUEUED
            if task in taken:
                self.settle(task, "cancelled")
            self.perform(self.dispatcher.taken_back(slot, taken, dropping=[task] if task in taken else []))
        elif where is Where.QUEUED:
            self.settle(task, "cancelled")
        assert self.outcomes.get(task) != "cancelled" or task not in self.begun

    @rule(seconds=st.floats(0.01, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.dispatcher.tick(self.now))

    @rule(slot=st.integers(0, SLOTS - 1), task=st.integers(-5, -1))
    def stray_answer(self, slot: int, task: int) -> None:
        assert list(self.dispatcher.finished(slot, task)) == []

    @precondition(lambda self: self.pending)
    @rule()
    def everything_ends(self) -> None:
        """From any state, workers that do their work bring every task to its end."""
        for _ in range(1000):
            if not self.pending:
                break
            self.wait(5.0)
            for slot in range(SLOTS):
                self.become_ready(slot)
                self.begin(slot)
                self.finish(slot)
        assert not self.pending, "a task is stuck"

    @invariant()
    def the_dispatcher_agrees_with_itself(self) -> None:
        self.dispatcher._check()

    @invariant()
    def every_task_is_somewhere(self) -> None:
        given = {task for slot in range(SLOTS) for task in self.dispatcher.given(slot)}
        assert given | set(self.dispatcher.queued) == self.pending

    @invariant()
    def no_task_waits_behind_a_running_one_while_a_ready_worker_is_idle(self) -> None:
        idle = [
            slot
            for slot in range(SLOTS)
            if self.dispatcher.state(slot) is State.READY and not self.dispatcher.given(slot)
        ]
        assert not (idle and self.dispatcher.queued)


TestKernel = Kernel.TestCase
TestKernel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
