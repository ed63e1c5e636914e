"""A short run of `python -m tests.chaos`, with a seed that a failure can be repeated with."""

from __future__ import annotations

from tests.chaos import Chaos


def test_every_task_has_one_right_outcome_while_workers_are_killed() -> None:
    chaos = Chaos(tasks=1200, seed=20, workers=3, threads=6)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 1200
    assert chaos.kills > 0
