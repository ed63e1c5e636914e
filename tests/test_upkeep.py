"""`_upkeep`: after which messages a worker looks for what was left behind."""

from __future__ import annotations

import pytest

from fdpool import _leftovers, _pipeline, _platform, commands
from fdpool._messages import Recycling
from fdpool._upkeep import Upkeep

LONG_S = 0.002


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked for; the worker has no child."""
    found: list[str] = []
    monkeypatch.setattr(_leftovers.Watch, "look", lambda _, task, __: found.append(task))
    monkeypatch.setattr(_platform, "has_children", lambda: False)
    monkeypatch.setattr("fdpool._upkeep._LOOK_EVERY_S", 60.0)
    return found


def test_after_a_program_that_left_no_child_nobody_looks(looks: list[str]) -> None:
    upkeep = Upkeep(Recycling())
    upkeep.ran("program", 1, LONG_S, careful=True)
    assert looks == []
    assert upkeep.has_unseen  # so there is a look when there is nothing to do


def test_after_a_program_that_left_a_child_there_is_a_look(
    looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_platform, "has_children", lambda: True)
    Upkeep(Recycling()).ran("program", 1, LONG_S, careful=True)
    assert looks == ["program"]


def test_a_program_is_looked_behind_for_the_short_task_before_it(looks: list[str]) -> None:
    upkeep = Upkeep(Recycling())
    upkeep.ran("short", 1, 0.0)
    upkeep.ran("program", 1, LONG_S, careful=True)
    assert looks == ["program"]


def test_once_that_has_been_looked_behind_programs_are_not_again(looks: list[str]) -> None:
    upkeep = Upkeep(Recycling())
    for name, careful in (("task", False), ("program", True), ("program", True)):
        upkeep.ran(name, 1, LONG_S, careful)
    assert looks == ["task"]


@pytest.mark.usefixtures("looks")
def test_a_program_whose_output_fills_the_worker_has_it_replaced() -> None:
    upkeep = Upkeep(Recycling(max_memory=1))
    upkeep.ran("program", 1, LONG_S, careful=True)
    assert upkeep.over


def test_what_runs_programs_is_careful_and_nothing_else_is() -> None:
    ours = {commands.run, commands.run_led, _pipeline.run}
    assert _leftovers.careful == {id(function) for function in ours}
