"""The pure core: which task goes where, by hand-written stories."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import pytest

from fdpool._dispatch import (
    LARGEST_BATCH,
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


def sent(actions: Sequence[Action]) -> list[tuple[int, int]]:
    """The (slot, task) pairs that were sent."""
    return [
        (action.slot, task) for action in actions if isinstance(action, SendTasks) for task in action.tasks
    ]


def send(slot: int, task: int) -> SendTasks:
    """What a task that is sent at once, by itself, answers to."""
    return SendTasks(slot, (task,))


def same(actions: Sequence[Action], *expected: Action) -> bool:
    """True if these are the actions, whatever kind of sequence holds the tasks."""
    return [a._replace(tasks=tuple(a.tasks)) if isinstance(a, SendTasks) else a for a in actions] == list(
        expected
    )


def ready_pool(workers: int, depth: int = 4, processors: int = sys.maxsize) -> Dispatcher:
    """A dispatcher whose workers are all ready and idle."""
    dispatcher = Dispatcher(workers, depth, processors=processors)
    for task in range(-workers, 0):
        dispatcher.submitted(task)
    for slot in range(workers):
        dispatcher.readied(slot)
        for task in dispatcher.given(slot):
            dispatcher.finished(slot, [task])
    assert dispatcher.idle
    return dispatcher


def test_the_first_task_starts_a_worker_and_lies_in_its_inbox_meanwhile() -> None:
    dispatcher = Dispatcher(2)
    assert same(dispatcher.submitted(1), StartWorker(0, 1), send(0, 1))


def test_a_worker_is_started_only_if_none_is_idle() -> None:
    dispatcher = ready_pool(1)
    assert same(dispatcher.submitted(1), send(0, 1))
    dispatcher = Dispatcher(3)
    dispatcher.submitted(1)
    dispatcher.readied(0)
    dispatcher.finished(0, [1])
    assert same(dispatcher.submitted(2), send(0, 2))
    assert same(dispatcher.submitted(3), StartWorker(1, 1), send(1, 3))


def test_no_more_workers_than_allowed_and_no_deeper_than_allowed() -> None:
    dispatcher = Dispatcher(2, depth=3)
    actions = [action for task in range(20) for action in dispatcher.submitted(task)]
    assert sum(isinstance(action, StartWorker) for action in actions) == 2
    assert len(sent(actions)) == 6
    assert list(dispatcher.queued) == list(range(6, 20))


def test_tasks_are_spread_evenly_when_all_are_busy() -> None:
    dispatcher = ready_pool(3)
    actions = [action for task in range(9) for action in dispatcher.submitted(task)]
    assert sorted(slot for slot, _ in sent(actions)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_finished_task_makes_room_for_the_first_in_the_queue() -> None:
    dispatcher = ready_pool(1, depth=2)
    for task in (1, 2, 3, 4):
        dispatcher.submitted(task)
    assert same(dispatcher.finished(0, [1]), send(0, 3))


def test_an_idle_worker_gets_what_a_busy_one_has_not_begun() -> None:
    dispatcher = ready_pool(2)
    for task in (1, 2, 3, 4):
        dispatcher.submitted(task)
    (slot_of_1,) = [slot for slot in (0, 1) if 1 in dispatcher.given(slot)]
    other = 1 - slot_of_1
    for task in dispatcher.given(other):
        actions = dispatcher.finished(other, [task])
    assert actions == [TakeBack(slot_of_1)]
    waiting = dispatcher.given(slot_of_1)[1:]
    assert sent(dispatcher.taken_back(slot_of_1, waiting))[0] == (other, waiting[0])


def test_nothing_is_taken_back_when_the_busy_worker_has_nothing_waiting() -> None:
    dispatcher = ready_pool(2)
    dispatcher.submitted(1)
    dispatcher.submitted(2)
    assert dispatcher.finished(dispatcher.slot_of(2) or 0, [2]) == ()


def test_a_worker_that_is_still_starting_can_be_relieved_of_all_its_tasks() -> None:
    dispatcher = Dispatcher(2)
    dispatcher.submitted(1)
    dispatcher.submitted(2)
    dispatcher.readied(0)
    assert dispatcher.finished(0, [1]) == [TakeBack(1)]
    assert sent(dispatcher.taken_back(1, [2])) == [(0, 2)]


def test_a_take_back_that_finds_nothing_changes_nothing() -> None:
    dispatcher = ready_pool(2)
    for task in (1, 2, 3):
        dispatcher.submitted(task)
    before = [dispatcher.given(slot) for slot in (0, 1)]
    assert list(dispatcher.taken_back(0, [])) == []
    assert [dispatcher.given(slot) for slot in (0, 1)] == before


def test_only_the_begun_task_is_lost_when_its_worker_dies() -> None:
    dispatcher = ready_pool(1)
    for task in (1, 2, 3):
        dispatcher.submitted(task)
    actions = dispatcher.exited(0, unread=[2, 3], now=0.0)
    assert same(actions, LoseTask(0, 1), StartWorker(0, 2), send(0, 2), send(0, 3))


def test_a_worker_killed_while_idle_is_noticed_by_nobody() -> None:
    dispatcher = ready_pool(1)
    assert list(dispatcher.exited(0, unread=[], now=0.0)) == []
    assert same(dispatcher.submitted(1), StartWorker(0, 2), send(0, 1))


def test_what_waits_behind_another_task_goes_to_a_new_worker_when_one_has_died() -> None:
    dispatcher = ready_pool(2)
    for task in (1, 2, 3):
        dispatcher.submitted(task)
    behind = dispatcher.slot_of(3)
    assert behind is not None
    begun = dispatcher.given(1 - behind)[0]
    assert same(dispatcher.exited(1 - behind, [], now=0.0), LoseTask(1 - behind, begun), TakeBack(behind))
    assert same(dispatcher.taken_back(behind, [3]), StartWorker(1 - behind, 2), send(1 - behind, 3))


def test_what_waits_behind_another_task_goes_to_a_new_worker_when_one_can_be_asked_for_again() -> None:
    dispatcher = ready_pool(2)
    dispatcher.exited(1, [], now=0.0)
    dispatcher.submitted(1)
    assert same(dispatcher.submitted(2), StartWorker(1, 2), send(1, 2))
    assert same(dispatcher.refused(1, now=0.0), send(0, 2))
    assert same(dispatcher.tick(2.0), TakeBack(0))
    assert same(dispatcher.taken_back(0, [2]), StartWorker(1, 3), send(1, 2))


def test_nothing_that_waits_has_workers_started_that_do_not_get_ready() -> None:
    """The pool would break for its sake, where somebody is there to run it."""
    dispatcher = ready_pool(2)
    dispatcher.exited(1, [], now=0.0)
    dispatcher.submitted(1)
    dispatcher.submitted(2)
    assert same(dispatcher.exited(1, [2], now=0.0), send(0, 2))
    assert list(dispatcher.tick(2.0)) == []


def test_a_task_that_was_in_the_inbox_of_a_dead_idle_worker_is_run_by_the_next() -> None:
    dispatcher = ready_pool(1)
    dispatcher.submitted(1)
    assert same(dispatcher.exited(0, unread=[1], now=0.0), StartWorker(0, 2), send(0, 1))


def test_workers_that_die_before_they_are_ready_break_the_pool_at_the_limit() -> None:
    dispatcher = Dispatcher(1, boot_limit=3)
    dispatcher.submitted(1)
    now = 0.0
    for _ in range(2):
        assert list(dispatcher.exited(0, unread=[1], now=now)) == []
        deadline = dispatcher.next_deadline()
        assert deadline is not None
        assert deadline > now
        assert list(dispatcher.tick(now)) == []
        now = deadline
        assert sent(dispatcher.tick(now)) == [(0, 1)]
    assert dispatcher.exited(0, unread=[1], now=now) == [BreakPool(3)]


def test_one_worker_that_becomes_ready_forgives_the_failures_before() -> None:
    dispatcher = Dispatcher(1, boot_limit=2)
    dispatcher.submitted(1)
    for _ in range(5):
        dispatcher.exited(0, unread=[1], now=0.0)
        dispatcher.tick(100.0)
        dispatcher.readied(0)
        dispatcher.exited(0, unread=[1], now=100.0)
    assert dispatcher.boot_failures == 0


def test_a_queued_task_is_withdrawn_and_never_sent() -> None:
    dispatcher = ready_pool(1, depth=1)
    dispatcher.submitted(1)
    dispatcher.submitted(2)
    assert dispatcher.withdraw(2) is Where.QUEUED
    assert list(dispatcher.finished(0, [1])) == []
    assert dispatcher.idle


def test_a_sent_task_is_withdrawn_by_taking_the_inbox_back() -> None:
    dispatcher = ready_pool(1)
    for task in (1, 2, 3):
        dispatcher.submitted(task)
    assert dispatcher.withdraw(2) is Where.GIVEN
    assert sent(dispatcher.taken_back(0, [2, 3], dropping=[2])) == [(0, 3)]
    assert dispatcher.withdraw(2) is Where.UNKNOWN


def test_a_full_inbox_gets_nothing_until_one_of_its_tasks_ends() -> None:
    dispatcher = ready_pool(1)
    dispatcher.submitted(1)
    dispatcher.submitted(2)
    dispatcher.inbox_full(0, [2], until=5.0)
    assert list(dispatcher.submitted(3)) == []
    assert dispatcher.next_deadline() is None
    assert sent(dispatcher.finished(0, [1])) == [(0, 2), (0, 3)]


def test_a_kernel_filled_by_others_is_asked_again_after_a_while() -> None:
    dispatcher = ready_pool(1)
    dispatcher.submitted(1)
    dispatcher.inbox_full(0, [1], until=5.0)
    assert dispatcher.next_deadline() == 5.0
    assert list(dispatcher.tick(4.9)) == []
    assert sent(dispatcher.tick(5.0)) == [(0, 1)]


def test_stray_answers_change_nothing() -> None:
    dispatcher = ready_pool(2)
    dispatcher.submitted(1)
    slot = dispatcher.slot_of(1)
    assert slot is not None
    assert list(dispatcher.finished(1 - slot, [1])) == []
    assert list(dispatcher.finished(slot, [99])) == []
    assert dispatcher.given(slot) == [1]


def test_dismissed_workers_leave_and_no_other_is_started() -> None:
    dispatcher = ready_pool(2)
    assert dispatcher.dismissed() == [DismissWorker(0), DismissWorker(1)]
    assert list(dispatcher.submitted(1)) == []


def test_closing_returns_what_was_not_done() -> None:
    dispatcher = ready_pool(1, depth=2)
    for task in (1, 2, 3):
        dispatcher.submitted(task)
    assert dispatcher.closed() == [1, 2, 3]
    assert dispatcher.idle


@pytest.mark.parametrize(("waited", "most"), [(False, LARGEST_BATCH), (True, 300 // 64)])
def test_short_tasks_go_in_full_messages_however_many_workers_there_are(waited: bool, most: int) -> None:
    """But where they wait for something, all workers are to have some."""
    dispatcher = of_two_processors(64, 1e-6, waited)
    for task in itertools.count(1000):
        dispatcher.submitted(task, alone=False)
        if len(dispatcher.queued) == 300:
            break
    slot = next(slot for slot in range(64) if dispatcher.given(slot))
    done = dispatcher.given(slot)
    actions = dispatcher.finished(slot, done, 1e-6 * len(done), waited)
    assert max(len(action.tasks) for action in actions if isinstance(action, SendTasks)) == most


def of_two_processors(workers: int, busy_s: float, waited: bool = False) -> Dispatcher:
    """Ready and idle workers on two processors, after many tasks that took so long."""
    dispatcher = ready_pool(workers, depth=16, processors=2)
    for _ in range(50):
        (action,) = dispatcher.submitted(0, alone=False)
        assert isinstance(action, SendTasks)
        dispatcher.finished(action.slot, [0], busy_s, waited)
    return dispatcher


def used(dispatcher: Dispatcher) -> list[int]:
    return [slot for slot in range(6) if dispatcher.has_given(slot)]


def test_short_tasks_wake_no_more_workers_than_there_are_processors() -> None:
    dispatcher = of_two_processors(6, 1e-6)
    for task in range(1, 200):
        dispatcher.submitted(task, alone=False)
    assert len(used(dispatcher)) == 2
    while not dispatcher.idle:
        slot = used(dispatcher)[0]
        dispatcher.finished(slot, dispatcher.given(slot), 1e-6)
        assert len(used(dispatcher)) <= 2


def test_what_a_full_inbox_does_not_take_goes_to_whoever_is_idle() -> None:
    """Who takes no more is none of those that are enough."""
    dispatcher = of_two_processors(6, 1e-6)
    for task in range(1, 5):
        dispatcher.submitted(task, alone=False)
    busy, _ = used(dispatcher)
    [*_, last] = dispatcher.given(busy)
    [(other, task)] = sent(dispatcher.inbox_full(busy, [last], until=5.0))
    assert task == last
    assert other != busy


def test_longer_tasks_and_such_as_go_alone_wake_whoever_is_idle() -> None:
    dispatcher = of_two_processors(6, 1e-3)
    for task in range(1, 7):
        dispatcher.submitted(task, alone=False)
    assert len(used(dispatcher)) == 6
    dispatcher = of_two_processors(6, 1e-6)
    for task in range(1, 7):
        dispatcher.submitted(task, alone=True)
    assert len(used(dispatcher)) == 6


def test_short_tasks_that_wait_for_something_wake_whoever_is_idle() -> None:
    dispatcher = of_two_processors(6, 20e-6, waited=True)
    for task in range(1, 7):
        dispatcher.submitted(task, alone=False)
    assert len(used(dispatcher)) == 6


def test_what_waits_behind_a_task_that_takes_long_after_all_goes_to_the_idle() -> None:
    dispatcher = of_two_processors(6, 1e-6)
    for task in range(1, 9):
        dispatcher.submitted(task, alone=False)
    other = max(used(dispatcher), key=lambda slot: len(dispatcher.given(slot)))
    first, *behind = dispatcher.given(other)
    assert behind
    assert dispatcher.piles(other)
    moved = {slot for slot, _ in sent(dispatcher.stalled(other, behind))}
    assert dispatcher.given(other) == [first]
    assert moved
    assert other not in moved
    # The next does not go there either, until what it is in has ended.
    for task in range(9, 100):
        assert other not in [slot for slot, _ in sent(dispatcher.submitted(task, alone=False))]
    dispatcher.finished(other, [first], 1e-6)
    while not dispatcher.idle:
        slot = used(dispatcher)[0]
        dispatcher.finished(slot, dispatcher.given(slot), 1e-3)
    for task in range(100, 106):
        dispatcher.submitted(task, alone=True)
    assert other in used(dispatcher)
    dispatcher._check()
