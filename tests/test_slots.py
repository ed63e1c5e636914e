"""The table of a slot's life: every cell, and the pauses."""

from __future__ import annotations

import pytest

from fdpool._slots import TABLE, Event, Slot, State, boot_pause_s


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_cell_is_decided(state: State, event: Event) -> None:
    slot = Slot(0)
    slot.state = state
    expected = TABLE[state, event]
    if expected is None:
        with pytest.raises(RuntimeError, match="slot 0 cannot be"):
            slot.step(event)
        assert slot.state is state
    else:
        assert slot.step(event) is expected


def test_a_closed_slot_never_opens_again() -> None:
    assert all(TABLE[State.CLOSED, event] is State.CLOSED for event in Event)


def test_no_worker_starts_where_one_may_still_live() -> None:
    for state in (State.STARTING, State.READY, State.LEAVING):
        assert TABLE[state, Event.WANTED] is None


def test_each_worker_has_its_own_generation() -> None:
    slot = Slot(3)
    for generation in (1, 2, 3):
        slot.step(Event.WANTED)
        slot.step(Event.READIED)
        assert slot.generation == generation
        slot.exited(now=0.0, failures=0)


def test_a_death_before_ready_cools_the_slot_and_one_after_does_not() -> None:
    slot = Slot(0)
    slot.step(Event.WANTED)
    assert slot.exited(now=10.0, failures=1) is State.COOLING
    assert slot.not_before == 10.0 + boot_pause_s(1)
    slot.step(Event.COOLED)
    slot.step(Event.WANTED)
    slot.step(Event.READIED)
    assert slot.exited(now=11.0, failures=0) is State.VACANT


def test_pauses_double_up_to_their_limit() -> None:
    pauses = [boot_pause_s(n) for n in range(1, 40)]
    assert pauses[:3] == [0.01, 0.02, 0.04]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0
