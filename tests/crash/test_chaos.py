"""A short run of `python -m tests.chaos`, with a seed to repeat a failure, as far as schedules allow."""

from __future__ import annotations

import pytest

from tests.chaos.kinds import KINDS, SPAN, World
from tests.chaos.run import Chaos


def test_every_task_has_one_right_outcome_whatever_is_killed_and_stopped() -> None:
    """T3, T26, W1, W5, P13."""
    pytest.importorskip("numpy")
    chaos = Chaos(seed=20, tasks=300, thief=False)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 300
    assert len(chaos.done) > len(KINDS) // 2
    assert chaos.kills > 0


def test_the_same_holds_while_the_client_lacks_descriptors_now_and_then() -> None:
    """T3, T26, W1."""
    pytest.importorskip("numpy")
    chaos = Chaos(seed=21, tasks=200)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 200
    assert chaos.disturbed["squeeze", "client"] > 0


def test_a_ledger_tells_what_ran_twice_or_against_what_was_said() -> None:
    """Or a chaos would find nothing, whatever happened in it."""
    chaos = Chaos(seed=22)
    world = World(None, None, "", None)  # type: ignore[arg-type]
    world.tries[3 * SPAN] = 2
    world.never.add(4 * SPAN)
    world.ran.update([1 * SPAN, 5 * SPAN + 7])
    entries = [1 * SPAN, 2 * SPAN + 1, 2 * SPAN + 1, 3 * SPAN, 3 * SPAN, 4 * SPAN]
    chaos._judge_ledger(world, "".join(f"{each}\n" for each in entries).encode())
    assert chaos.wrong == [
        "task 2, its part 1 ran 2 times",
        "task 4 ran, and was said not to have",
        "task 5, its part 7 gave a result, and has not run",
    ]
