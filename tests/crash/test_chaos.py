"""A short run of `python -m tests.chaos`, with a seed to repeat a failure, as far as schedules allow."""

from __future__ import annotations

import pytest

from tests.chaos.kinds import KINDS
from tests.chaos.run import Chaos


def test_every_task_has_one_right_outcome_whatever_is_killed_and_stopped() -> None:
    """T3, T26, W1, W5, P13."""
    pytest.importorskip("numpy")
    chaos = Chaos(seed=20, tasks=500)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 500
    assert len(chaos.done) > len(KINDS) // 2
    assert chaos.kills > 0
