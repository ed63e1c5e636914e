"""The pure core to the end of a pool, from whatever state random events have brought it to; every cell of a slot's
table is reached on the way, save those that nobody asks for."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from fdpool._dispatch import BreakPool, DismissWorker, Dispatcher, LoseTask, StartWorker
from fdpool._slots import TABLE, Event, Slot, State

from .test_dispatch_model import SLOTS, Kernel

#: Legal, and asked for by nobody: the dispatcher dismisses only who is there, and a closed one starts nothing.
UNASKED = {
    (State.VACANT, Event.DISMISSED),
    (State.COOLING, Event.DISMISSED),
    (State.LEAVING, Event.DISMISSED),
    (State.CLOSED, Event.WANTED),
    (State.CLOSED, Event.DISMISSED),
    (State.CLOSED, Event.COOLED),
}


class Life(Kernel):
    """The model of `test_dispatch_model`, with strays, parted chunks, and ends that are tried on a copy."""

    @rule(slot=st.integers(0, SLOTS - 1))
    def hear_a_stray_ready(self, slot: int) -> None:
        """Of a child that a task has forked, say: it changes nothing, unless a worker starts there."""
        if self.workers[slot] != "starting":
            state = self.dispatcher.state(slot)
            self.perform(self.dispatcher.readied(slot))
            assert self.dispatcher.state(slot) is state

    @rule(slot=st.integers(0, SLOTS - 1))
    def part_what_runs(self, slot: int) -> None:
        """A chunk ends early: what is left of it comes before all others."""
        task = self.running[slot]
        if task is not None and not self.logged[slot] and self.workers[slot] == "ready":
            self.running[slot] = None
            parts = [next(self.ids), next(self.ids)]
            self.pending.update(parts)
            self.alone.update(parts)
            self.dispatcher.put_first(parts)
            assert list(self.dispatcher.queued)[:2] == parts
            self.settle(task, "done")
            self.perform(self.dispatcher.finished(slot, [task]))

    @rule()
    def change_ones_mind(self) -> None:
        """A worker may be started for a task that is cancelled before it is there."""
        if not self.pending:
            self.submit(1, True)
            self.cancel(0)
            if not self.pending:
                self.dismiss_a_copy()

    @rule()
    def break_off(self) -> None:
        """Close it with whatever is under way: each task that is not done comes back once, and nothing starts again."""
        ended = copy.deepcopy(self.dispatcher)
        assert sorted(ended.closed()) == sorted(self.pending)
        for slot in range(SLOTS):
            assert list(ended.readied(slot)) == []
            assert list(ended.exited(slot, self.inbox_of(slot), self.now)) == []
            assert list(ended.finished(slot, [1, 2, 3])) == []
        assert list(ended.tick(self.now + 100)) == []
        assert ended.closed() == []
        assert ended.next_deadline() is None
        assert ended.idle
        ended._check()

    @rule()
    def dismiss_when_nothing_is_left(self) -> None:
        if not self.pending:
            self.dismiss_a_copy()

    def dismiss_a_copy(self) -> None:
        """The orderly end: whoever is there is told once, and nobody follows."""
        ended = copy.deepcopy(self.dispatcher)
        told = list(ended.dismissed())
        assert all(isinstance(action, DismissWorker) for action in told)
        there = [slot for slot in range(SLOTS) if self.workers[slot] in ("starting", "ready")]
        assert sorted(action.slot for action in told if isinstance(action, DismissWorker)) == there
        assert copy.deepcopy(ended).closed() == []
        for slot in range(SLOTS):
            if self.workers[slot] is not None:
                assert list(ended.readied(slot)) == []
                assert list(ended.exited(slot, (), self.now)) == []
        assert list(ended.tick(self.now + 100)) == []
        assert not [slot for slot in range(SLOTS) if ended.state(slot) is not State.VACANT]
        ended._check()

    def inbox_of(self, slot: int) -> list[int]:
        return [task for message in self.inboxes[slot] for task in message]


def test_every_cell_of_a_slots_life_is_reached_and_no_task_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = set()
    step = Slot.step

    def record(slot: Slot, event: Event) -> State:
        reached.add((slot.state, event))
        return step(slot, event)

    monkeypatch.setattr(Slot, "step", record)
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )
    # Those that chance rarely comes to: a worker dies at once, and its word of being ready is read after that; one that
    # was ready dies.
    dispatcher = Dispatcher(1)
    dispatcher.submitted(1)
    dispatcher.exited(0, [1], 0.0)
    dispatcher.readied(0)
    dispatcher.tick(10.0)
    dispatcher.readied(0)
    dispatcher.exited(0, [], 10.0)
    assert reached == {cell for cell, following in TABLE.items() if following is not None} - UNASKED


@pytest.mark.parametrize(("killed", "limit"), [(False, 3), (True, 12)])
def test_failed_boots_in_a_row_break_the_pool_and_one_that_is_ready_forgives_them(
    killed: bool, limit: int
) -> None:
    def boot_and_die(now: float) -> list[object]:
        actions = list(dispatcher.tick(now))
        [start] = [action for action in actions if isinstance(action, StartWorker)]
        return list(dispatcher.exited(start.slot, dispatcher.given(start.slot), now, killed))

    dispatcher = Dispatcher(1)
    assert isinstance(dispatcher.submitted(1)[0], StartWorker)
    assert list(dispatcher.exited(0, [1], 0.0, killed)) == []
    for failure in range(2, limit):
        assert boot_and_die(100.0 * failure) == []
    actions = list(dispatcher.tick(1e4))
    assert isinstance(actions[0], StartWorker)
    dispatcher.readied(0)
    assert dispatcher.boot_failures == 0
    assert next(iter(dispatcher.exited(0, [], 1e4, killed))) == LoseTask(0, 1)
    assert isinstance(dispatcher.submitted(2)[0], StartWorker)
    assert list(dispatcher.exited(0, [2], 1e4, killed)) == []
    for failure in range(2, limit):
        assert boot_and_die(1e4 + 100.0 * failure) == []
    assert boot_and_die(1e5) == [BreakPool(limit)]
