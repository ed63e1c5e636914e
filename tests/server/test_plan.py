"""The server's decisions, without a process or a clock: what is started, drained, replaced (S2, S3, S4, S11)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from fdpool._server.plan import (
    Abandoned,
    Action,
    CallWorker,
    CloseGeneration,
    DrainWorker,
    EndWorker,
    GaveUp,
    Over,
    Plan,
    Reloaded,
    Retires,
    Settings,
    Started,
    StartWorker,
)
from fdpool._server.states import TABLE, Event, State, step


class World:
    """Workers that do as they are told, when the test says so."""

    def __init__(self, wanted: int, **settings: object) -> None:
        self.now = 100.0
        self.plan = Plan(wanted, Settings(**settings))  # type: ignore[arg-type]
        self.news: list[Action] = []
        self.booting: dict[int, StartWorker] = {}
        self.standing: dict[int, StartWorker] = {}
        self.called: set[int] = set()
        self.serving: dict[int, StartWorker] = {}
        self.draining: dict[int, StartWorker] = {}
        self.doomed: set[int] = set()
        self.closes = True  # who drains says at once that it accepts no more
        self.closing: list[int] = []
        self.open = {1}
        self.do(self.plan.begin(self.now))

    def do(self, actions: Sequence[Action]) -> None:
        self.plan._check()
        for action in actions:
            if isinstance(action, DrainWorker) and self.closes:
                self.closing.append(action.worker)
            if isinstance(action, StartWorker):
                assert action.generation in self.open
                self.booting[action.worker] = action
            elif isinstance(action, CallWorker):
                assert action.worker not in self.called
                self.called.add(action.worker)
                if action.worker in self.standing:
                    self.booting[action.worker] = self.standing.pop(action.worker)
            elif isinstance(action, DrainWorker):
                for those in (self.serving, self.standing):
                    if action.worker in those:
                        self.draining[action.worker] = those.pop(action.worker)
                assert action.worker in self.draining
            elif isinstance(action, EndWorker):
                assert action.worker in {**self.booting, **self.standing, **self.serving, **self.draining}
                self.doomed.add(action.worker)
            else:
                self.news.append(action)
                if isinstance(action, CloseGeneration):
                    everybody = {**self.booting, **self.standing, **self.serving, **self.draining}
                    assert action.generation not in [each.generation for each in everybody.values()]
                    self.open.remove(action.generation)
        while self.closing:
            self.do(self.plan.closed(self.closing.pop(), self.now))

    def reload(self) -> None:
        self.open.add(self.plan.newest + 1)
        self.do(self.plan.reload(self.now))

    def ready(self, worker: int | None = None) -> None:
        """Have a booting worker serve, or stand by if it was told so; the first one, if none is named."""
        worker = next(each for each in self.booting if each not in self.doomed) if worker is None else worker
        if self.booting[worker].stands_by and worker not in self.called:
            self.standing[worker] = self.booting.pop(worker)
            self.do(self.plan.stood_by(worker, self.now))
            return
        self.serving[worker] = self.booting.pop(worker)
        self.do(self.plan.readied(worker, self.now))

    def all_ready(self) -> None:
        """Have workers boot, drain and die as they are told, until nothing is left to do."""
        while self.doomed or self.draining or self.booting:
            if self.doomed:
                self.exit(min(self.doomed))
            elif self.draining:
                self.exit(min(self.draining))
            else:
                self.ready()

    def exit(self, worker: int, why: str = "it died") -> None:
        for place in (self.booting, self.standing, self.serving, self.draining):
            place.pop(worker, None)
        self.doomed.discard(worker)
        self.do(self.plan.exited(worker, self.now, why))

    def fail_boot(self, why: str = "ImportError: no") -> None:
        self.exit(next(iter(self.booting)), why)

    def wait(self, seconds: float) -> None:
        """Let time pass, and look whenever the plan has asked for it."""
        until = self.now + seconds
        while (moment := self.plan.next_deadline()) is not None and moment <= until:
            self.now = max(self.now, moment)
            self.do(self.plan.tick(self.now))
        self.now = until
        self.do(self.plan.tick(self.now))

    def generations(self) -> list[int]:
        return sorted(each.generation for each in self.serving.values())

    def told(self, kind: type[Action]) -> list[Action]:
        found = [each for each in self.news if isinstance(each, kind)]
        self.news = [each for each in self.news if not isinstance(each, kind)]
        return found


def started(wanted: int, **settings: object) -> World:
    world = World(wanted, **settings)
    world.all_ready()
    assert world.told(Started) == [Started()]
    return world


# -- the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_cell_of_the_table_is_decided(state: State, event: Event) -> None:
    if TABLE[state, event] is None:
        assert state is State.GONE
        with pytest.raises(RuntimeError, match="cannot be"):
            step(state, event)
    else:
        assert step(state, event) in State


# -- beginning ---------------------------------------------------------------------------------------


def test_all_workers_are_started_at_once_and_it_has_started_when_all_serve() -> None:
    world = World(3)
    assert len(world.booting) == 3
    world.ready()
    world.ready()
    assert world.told(Started) == []
    world.ready()
    assert world.told(Started) == [Started()]


def test_a_dead_worker_is_replaced_at_once() -> None:
    world = started(2)
    world.exit(min(world.serving))
    assert [each.slot for each in world.booting.values()] == [0]


def test_who_dies_young_again_and_again_is_replaced_ever_later_but_never_given_up() -> None:
    """S4, after boot: a slot whose workers die soon must not take the processor from the others."""
    world = started(2)
    pauses = []
    for _ in range(12):
        world.exit(next(number for number, each in world.serving.items() if each.slot == 0))
        before = world.now
        while not world.booting:
            moment = world.plan.next_deadline()
            assert moment is not None
            world.wait(moment - world.now)
        pauses.append(world.now - before)
        world.ready()
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(2.0)
    assert world.told(GaveUp) == []


def test_who_dies_old_is_replaced_at_once_however_often() -> None:
    world = started(1)
    for _ in range(5):
        world.wait(60)
        world.exit(next(iter(world.serving)))
        world.ready()


# -- boots that fail ---------------------------------------------------------------------------------


def test_failed_boots_are_repeated_ever_later_and_then_it_gives_up() -> None:
    """S4: a crash loop ends, and an orchestrator is told."""
    world = World(1, boot_limit=5)
    moments = []
    while not world.told(GaveUp):
        moments.append(world.now)
        world.fail_boot()
        if world.plan.next_deadline() is not None and not world.booting:
            world.wait(world.plan.next_deadline() - world.now)  # type: ignore[operator]
    pauses = [later - earlier for earlier, later in pairwise(moments)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert world.told(Over) == [Over()]


@pytest.mark.parametrize("how", ["fail", "hang"])
def test_boots_that_fail_together_are_one_attempt(how: str) -> None:
    """S4: what is not there for a moment, a database say, fails all of them; that is to be tried again, too."""
    world = World(8, boot_limit=5, boot_timeout_s=5.0)
    attempts: list[float] = []
    while not world.told(GaveUp):
        assert len(world.booting) == 8
        attempts.append(world.now)
        if how == "hang":
            world.wait(5.0)
        for worker in [*world.booting]:
            if how == "fail":
                world.wait(0.01)
            world.exit(worker)
        if not world.plan.stopping:
            pause = world.plan.next_deadline()
            assert pause is not None
            world.wait(pause - world.now)
    boot_s = 8 * 0.01 if how == "fail" else 5.0
    pauses = [later - earlier - boot_s for earlier, later in pairwise(attempts)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_a_boot_that_takes_longer_than_a_pause_fails_with_those_that_it_began_with() -> None:
    world = World(2, boot_limit=3)
    slow, quick = world.booting
    world.exit(quick)
    world.wait(0.1)
    _, again = world.booting
    world.exit(slow)
    assert world.plan.boot_failures == 1
    assert not world.told(GaveUp)
    world.exit(again)
    assert world.plan.boot_failures == 2
    world.wait(0.2)
    for worker in [*world.booting]:
        world.exit(worker)
    assert world.plan.boot_failures == 3
    assert world.told(GaveUp)


def test_a_boot_that_fails_after_another_has_succeeded_counts_anew() -> None:
    world = World(3)
    first, second, third = world.booting
    world.exit(first)
    world.ready(second)
    assert world.plan.boot_failures == 0
    world.exit(third)
    assert world.plan.boot_failures == 1


def test_it_does_not_give_up_while_somebody_serves() -> None:
    world = started(2, boot_limit=3)
    world.exit(min(world.serving))
    for _ in range(10):
        world.fail_boot()
        world.wait(20)
    assert world.told(GaveUp) == []
    world.ready()
    assert world.plan.boot_failures == 0


def test_a_worker_that_hangs_at_boot_is_ended_and_counts_as_failed() -> None:
    world = World(1, boot_timeout_s=5.0)
    world.wait(4.9)
    assert not world.doomed
    world.wait(0.2)
    assert len(world.doomed) == 1
    assert world.plan.boot_failures == 1
    world.exit(min(world.doomed))
    assert world.plan.boot_failures == 1


# -- reloads -----------------------------------------------------------------------------------------


def test_a_reload_replaces_one_by_one_and_drains_only_who_has_a_successor() -> None:
    """S1: at every moment at least as many workers serve as are wanted."""
    world = started(3)
    world.reload()
    for done in range(3):
        assert [each.generation for each in world.booting.values()] == [2]
        assert len(world.serving) == 3
        world.ready()
        assert world.generations() == [1] * (2 - done) + [2] * (done + 1)
    assert world.told(Reloaded) == [Reloaded(2)]
    assert world.open == {1, 2}
    world.all_ready()
    assert world.told(CloseGeneration) == [CloseGeneration(1)]


def test_a_reload_is_done_when_no_old_worker_accepts_any_more() -> None:
    world = started(2)
    world.closes = False
    world.reload()
    world.ready()
    world.ready()
    first, second = world.draining
    world.do(world.plan.closed(first, world.now))
    assert world.told(Reloaded) == []
    world.do(world.plan.closed(second, world.now))
    assert world.told(Reloaded) == [Reloaded(2)]


def test_a_reload_takes_as_many_at_a_time_as_it_is_told() -> None:
    world = started(5, batch=2)
    world.reload()
    assert len(world.booting) == 2
    world.ready()
    assert len(world.booting) == 2


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_new_code_that_does_not_boot_is_abandoned_and_the_old_goes_on(how: str) -> None:
    """S2: nobody who serves is touched."""
    world = started(2, boot_timeout_s=5.0)
    serving = dict(world.serving)
    world.reload()
    if how == "fails":
        world.fail_boot("SyntaxError: invalid syntax")
    else:
        world.wait(6)
    abandoned = world.told(Abandoned)
    assert len(abandoned) == 1
    assert abandoned[0][0] == 2
    world.all_ready()
    world.wait(60)
    assert world.serving == serving
    assert world.plan.target == 1
    assert world.told(CloseGeneration) == [CloseGeneration(2)]


def test_new_code_that_boots_once_and_then_never_is_rolled_back() -> None:
    world = started(3, boot_limit=2)
    world.reload()
    world.ready()
    for _ in range(2):
        world.fail_boot()
        world.wait(1)
    assert len(world.told(Abandoned)) == 1
    world.all_ready()
    assert world.generations() == [1, 1, 1]


def test_of_two_reloads_the_last_wins_wherever_the_first_has_got() -> None:
    """S3."""
    for ready_before in range(3):
        world = started(3)
        world.reload()
        for _ in range(ready_before):
            world.ready()
        world.reload()
        assert {each.generation for number, each in world.booting.items() if number not in world.doomed} == {
            3
        }
        world.all_ready()
        assert world.generations() == [3, 3, 3]
        assert world.told(Reloaded) == [Reloaded(3)]
        assert world.open == {3}


def test_a_failed_second_reload_falls_back_to_the_first_if_that_has_served() -> None:
    world = started(2)
    world.reload()
    world.ready()
    world.reload()
    world.exit(next(number for number in world.booting if number not in world.doomed))
    world.all_ready()
    assert world.generations() == [2, 2]
    assert world.open == {2}


def test_a_death_during_a_reload_is_filled_with_the_old_code_until_the_new_has_served() -> None:
    world = started(3)
    world.reload()
    victim = next(number for number, each in world.serving.items() if each.slot == 2)
    world.exit(victim)
    assert sorted((each.slot, each.generation) for each in world.booting.values()) == [(0, 2), (2, 1)]
    world.all_ready()
    assert world.generations() == [2, 2, 2]


def test_scaling_during_a_reload_is_heeded() -> None:
    """S3."""
    world = started(3)
    world.reload()
    world.ready()
    world.do(world.plan.scale(5, world.now))
    world.all_ready()
    assert world.generations() == [2] * 5
    world.reload()
    world.do(world.plan.scale(1, world.now))
    world.all_ready()
    assert world.generations() == [3]


# -- replacing without a reload ------------------------------------------------------------------------


def test_a_retiring_worker_serves_until_its_successor_does() -> None:
    world = started(2)
    oldest = min(world.serving)
    world.do(world.plan.retire(oldest, world.now, "it is enough"))
    assert oldest in world.serving
    world.ready()
    assert oldest in world.draining
    assert len(world.serving) == 2


def test_why_a_worker_is_replaced_is_told_once() -> None:
    world = started(1, max_age_s=1000.0, jitter=0.0, boot_timeout_s=1e6)
    world.wait(1000)
    assert world.told(Retires) == [Retires(1, "it has served for 1000.0 seconds, and its max_age is over")]
    world.do(world.plan.retire(1, world.now, "it is enough"))
    world.ready()
    world.do(world.plan.retire(1, world.now, "it is enough"))
    assert world.told(Retires) == []
    world.do(world.plan.retire(2, world.now, "it is enough"))
    world.do(world.plan.retire(2, world.now, "it is more than enough"))
    world.wait(1000)
    assert world.told(Retires) == [Retires(2, "it is enough")]
    world.do(world.plan.retire(3, world.now, "as it boots"))
    assert world.told(Retires) == []
    world.ready()
    assert world.told(Retires) == [Retires(3, "as it boots")]


def test_who_is_to_retire_while_it_boots_serves_first_and_takes_its_place() -> None:
    world = started(1)
    [old] = world.serving
    world.reload()
    [early] = world.booting
    world.do(world.plan.retire(early, world.now, "it is enough"))
    assert [*world.booting] == [early]
    world.ready()
    assert old in world.draining
    assert early in world.serving
    world.ready()
    assert early in world.draining
    world.all_ready()
    assert world.told(Reloaded) == [Reloaded(2)]
    assert not world.booting


def test_who_are_all_to_retire_while_they_boot_are_replaced_ever_later_and_serve_meanwhile() -> None:
    world = started(2)
    world.do(world.plan.retire(min(world.serving), world.now, "it is enough"))
    pauses = []
    for _ in range(12):
        [early] = world.booting
        world.do(world.plan.retire(early, world.now, "it is enough"))
        world.ready()
        world.exit(min(world.draining))
        before = world.now
        while not world.booting:
            assert early in world.serving
            moment = world.plan.next_deadline()
            assert moment is not None
            world.wait(moment - world.now)
        pauses.append(world.now - before)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(2.0)


def test_who_are_too_large_from_their_start_are_replaced_ever_later_and_serve_meanwhile() -> None:
    world = started(2)
    pauses = []
    for _ in range(12):
        large = next(number for number, each in world.serving.items() if each.slot == 0)
        world.do(world.plan.retire(large, world.now, "it is large", too_large=True))
        before = world.now
        while not world.booting:
            assert large in world.serving
            moment = world.plan.next_deadline()
            assert moment is not None
            world.wait(moment - world.now)
        pauses.append(world.now - before)
        world.all_ready()
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(2.0)
    assert all(told.too_soon for told in world.told(Retires))  # type: ignore[union-attr]


def test_who_has_become_too_large_is_replaced_at_once_however_often() -> None:
    world = started(1)
    for _ in range(5):
        world.wait(60)
        [large] = world.serving
        world.do(world.plan.retire(large, world.now, "it is large", too_large=True))
        assert world.booting
        world.all_ready()
    assert not any(told.too_soon for told in world.told(Retires))  # type: ignore[union-attr]


def test_a_reload_is_over_when_all_are_of_the_new_code_however_soon_they_are_to_be_replaced_again() -> None:
    world = started(2)
    world.reload()
    for _ in range(2):
        world.ready()
        for worker, each in world.serving.items():
            if each.generation == 2:
                world.do(world.plan.retire(worker, world.now, "it is enough"))
    assert world.generations() == [2, 2]
    assert world.told(Reloaded) == [Reloaded(2)]
    world.all_ready()
    assert not world.told(Reloaded)


def test_a_server_has_started_when_all_serve_however_soon_they_are_to_be_replaced() -> None:
    world = World(2)
    world.ready()
    world.do(world.plan.retire(min(world.serving), world.now, "it is enough"))
    world.ready(2)
    assert world.told(Started) == [Started()]


def test_whoever_is_to_be_replaced_has_his_turn_however_soon_others_are_to_be_again() -> None:
    world = started(4)
    world.reload()
    for _ in range(4):
        world.ready()
        for worker, each in list(world.serving.items()):
            if each.generation == 2:
                world.do(world.plan.retire(worker, world.now, "it is enough"))
    assert world.generations() == [2, 2, 2, 2]


def test_workers_of_an_age_are_not_all_replaced_at_the_same_time() -> None:
    world = started(8, max_age_s=1000.0, jitter=0.1)
    world.wait(899)
    assert not world.booting
    moments = {each.retire_at for each in world.plan.workers.values()}
    assert len(moments) == 8
    world.wait(sorted(moments)[0] - world.now + 59)  # before the first successor is overdue
    assert sum(each.retiring for each in world.plan.workers.values()) > 1
    assert len(world.booting) == 1  # a batch at a time
    world.all_ready()
    assert len(world.serving) == 8


def test_a_hung_worker_is_ended_and_its_place_filled_meanwhile() -> None:
    world = started(2)
    worker = min(world.serving)
    world.do(world.plan.hung(worker, world.now, "a request has not moved on"))
    assert worker in world.doomed
    assert len(world.booting) == 1


def test_scaling_down_drains_those_that_are_too_many() -> None:
    world = started(3)
    world.do(world.plan.scale(1, world.now))
    assert sorted(each.slot for each in world.draining.values()) == [1, 2]
    world.all_ready()
    assert [each.slot for each in world.serving.values()] == [0]


def test_there_is_always_one_worker() -> None:
    world = started(1)
    world.do(world.plan.scale(0, world.now))
    assert world.plan.wanted == 1


# -- the end -----------------------------------------------------------------------------------------


def test_a_stop_drains_all_and_kills_who_outstays_the_grace() -> None:
    world = started(2)
    world.do(world.plan.stop(10.0, world.now))
    assert len(world.draining) == 2
    world.exit(min(world.draining))
    world.wait(10.5)
    assert not world.doomed
    world.wait(1)
    assert len(world.doomed) == 1
    world.exit(min(world.doomed))
    assert world.told(Over) == [Over()]


def test_a_second_stop_can_only_be_sooner() -> None:
    """S3."""
    world = started(1)
    world.do(world.plan.stop(10.0, world.now))
    world.do(world.plan.stop(1.0, world.now))
    world.wait(2.1)
    assert len(world.doomed) == 1


def test_a_stop_at_once_kills_whatever_there_is() -> None:
    world = started(2)
    world.reload()
    world.do(world.plan.stop(0.0, world.now))
    assert len(world.doomed) == 3


def test_after_a_stop_nothing_is_started_whatever_happens() -> None:
    world = started(2)
    world.do(world.plan.stop(10.0, world.now))
    world.do(world.plan.reload(world.now))
    world.do(world.plan.scale(9, world.now))
    world.exit(min(world.draining))
    assert not world.booting
    assert not world.told(Reloaded)


# -- standing by -----------------------------------------------------------------------------------------


def test_who_stands_by_is_started_when_all_others_serve() -> None:
    world = World(2, standby=1)
    assert [each.slot for each in world.booting.values()] == [0, 1]
    world.ready()
    assert len(world.booting) == 1
    world.ready()
    assert world.told(Started) == [Started()]
    [stands_by] = world.booting.values()
    assert (stands_by.slot, stands_by.stands_by) == (2, True)
    world.ready()
    assert not world.booting
    assert list(world.standing) == [3]


def test_who_stands_by_is_called_in_place_of_one_that_is_lost_and_has_a_successor_when_it_serves() -> None:
    world = started(2, standby=1)
    world.exit(1)
    assert world.called == {3}
    assert list(world.booting) == [3]
    world.ready()
    assert sorted(world.serving) == [2, 3]
    [stands_by] = world.booting.values()
    assert (stands_by.slot, stands_by.stands_by) == (0, True)


def test_where_nobody_stands_by_yet_another_one_is_started() -> None:
    world = World(2, standby=1)
    world.ready()
    world.ready()
    world.exit(1)  # the third boots
    assert not world.called
    assert [(each.slot, each.stands_by) for each in world.booting.values()] == [(2, True), (0, False)]


def test_one_that_fails_as_it_is_called_has_failed_to_boot() -> None:
    world = started(1, standby=1, boot_limit=2)
    world.exit(1)
    world.fail_boot("lifespan")
    assert [each.stands_by for each in world.booting.values()] == []
    world.wait(0.2)
    assert [each.stands_by for each in world.booting.values()] == [False]
    world.fail_boot("lifespan")
    assert world.told(GaveUp)


@pytest.mark.parametrize("why", ["reload", "retire"])
def test_who_stands_by_is_called_also_where_one_that_has_yet_to_load_is_to_take_that_place(why: str) -> None:
    world = started(1, standby=1)
    if why == "reload":
        world.reload()
    else:
        world.do(world.plan.retire(1, world.now, "it is too large"))
    assert list(world.booting) == [3]
    world.exit(1)
    assert world.called == {2}
    world.ready(2)
    assert list(world.serving) == [2]
    world.all_ready()
    assert (len(world.serving), len(world.standing)) == (1, 1)


def test_one_that_fails_to_stand_by_costs_nobody_who_serves_anything() -> None:
    world = started(1, standby=1, boot_limit=3)
    world.exit(2)
    for _ in range(6):
        world.fail_boot()
        world.wait(20)
    world.all_ready()
    assert len(world.standing) == 1
    world.exit(1)
    world.fail_boot("lifespan")  # of the one that was called
    world.wait(0.2)
    assert not world.told(GaveUp)
    world.all_ready()
    assert (len(world.serving), len(world.standing)) == (1, 1)


def test_one_that_stands_by_and_dies_is_replaced() -> None:
    world = started(1, standby=1)
    world.exit(2)
    assert [each.stands_by for each in world.booting.values()] == [True]


def test_a_reload_replaces_who_stands_by_too() -> None:
    world = started(2, standby=1)
    world.reload()
    world.all_ready()
    assert world.told(Reloaded) == [Reloaded(2)]
    assert world.generations() == [2, 2]
    assert [each.generation for each in world.standing.values()] == [2]


def test_fewer_workers_leave_one_that_stands_by() -> None:
    world = started(3, standby=1)
    world.exit(1)
    world.all_ready()  # 0 stands by
    world.do(world.plan.scale(1, world.now))
    world.all_ready()
    assert (len(world.serving), len(world.standing)) == (1, 1)
    world.do(world.plan.scale(2, world.now))
    assert not world.standing
    world.all_ready()
    assert (len(world.serving), len(world.standing)) == (2, 1)


def test_a_stop_ends_who_stands_by() -> None:
    world = started(1, standby=1)
    world.do(world.plan.stop(5.0, world.now))
    assert sorted(world.draining) == [1, 2]
    world.all_ready()
    assert world.told(Over)


# -- all of it, in any order --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_in_whatever_order_the_last_wish_comes_true(seed: int) -> None:
    """S3: reloads, scalings, deaths, failed boots and hangs at random; then, left alone, all is as wanted."""
    chance = random.Random(seed)
    standby = max(0, chance.randrange(-2, 3))
    limits = {"boot_limit": 4, "boot_timeout_s": 5.0, "standby": standby}
    world = started(chance.randrange(1, 5), batch=chance.randrange(1, 3), **limits)
    for _ in range(200):
        everybody = [*world.booting, *world.standing, *world.serving, *world.draining]
        event = chance.randrange(9)
        if event == 0:
            world.reload()
        elif event == 1:
            world.do(world.plan.scale(chance.randrange(1, 6), world.now))
        elif event == 2 and everybody:
            world.exit(chance.choice(everybody))
        elif event in (3, 4) and (able := [each for each in world.booting if each not in world.doomed]):
            world.ready(chance.choice(able))
        elif event == 5 and everybody:
            worker = chance.choice(everybody)
            world.do(world.plan.retire(worker, world.now, "it is enough", too_large=worker % 2 == 0))
        elif event == 6 and everybody:
            world.do(world.plan.hung(chance.choice(everybody), world.now, "hung"))
        elif event == 7 and world.draining:
            world.exit(chance.choice([*world.draining]))
        else:
            world.wait(chance.choice([0.01, 0.3, 6.0]))
        if world.told(GaveUp):
            assert not set(world.serving) - world.doomed
            return
    for _ in range(100):
        world.all_ready()
        world.wait(1)
    assert (len(world.serving), len(world.standing)) == (world.plan.wanted, standby)
    assert set(world.generations()) == {world.plan.target}
    assert {each.generation for each in world.standing.values()} <= {world.plan.target}
    assert world.plan.coming is None
    assert world.open == {world.plan.generation}
