"""A short run of `python -m tests.chaos`, with a seed to repeat a failure, as far as schedules allow."""

from __future__ import annotations

import pytest

from tests.chaos.kinds import KINDS
from tests.chaos.run import Chaos


def test_every_task_has_one_right_outcome_whatever_is_killed_and_stopped() -> None:
    """T3, T26, W1, W5, P13."""
    pytest.importorskip("numpy")
    chaos = Chaos(seed=20, tasks=300)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 300
    assert len(chaos.done) > len(KINDS) // 2
    assert chaos.kills > 0


def test_the_same_holds_while_the_client_lacks_descriptors_now_and_then() -> None:
    """T3, T26, W1."""
    pytest.importorskip("numpy")
    chaos = Chaos(seed=21, tasks=200, thief=True)
    assert chaos.run() == []
    assert sum(chaos.done.values()) == 200
    assert chaos.disturbed
