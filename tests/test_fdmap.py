"""`_fdmap`: plans of file actions, against a model of the kernel's descriptor table (X1)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fdpool._fdmap import Action, Close, Dup, check_targets, plan

Table = dict[int, tuple[str, bool]]  # number -> the file, and whether it is close-on-exec


def performed(actions: list[Action], table: Table) -> Table:
    """What the kernel makes of `table`; an action on a number that is not open fails the test."""
    table = dict(table)
    for action in actions:
        if isinstance(action, Close):
            table.pop(action.fd, None)
        elif action.source != action.target:  # POSIX: equal numbers are no action
            table[action.target] = (table[action.source][0], False)
        else:
            assert action.source in table
    return table


def after_exec(table: Table) -> dict[int, str]:
    return {fd: file for fd, (file, cloexec) in table.items() if not cloexec}


numbers = st.integers(0, 12)


@st.composite
def situations(draw: Any) -> tuple[dict[int, int], Table]:
    """A worker's descriptors, some of them inheritable by mistake, and a map into them."""
    opened = draw(st.sets(numbers, min_size=1))
    table = {fd: (f"file {fd}", draw(st.booleans())) for fd in sorted(opened)}
    wanted = draw(st.dictionaries(numbers, st.sampled_from(sorted(opened))))
    return wanted, table


@settings(max_examples=100, deadline=None)
@given(situations())
@example(({1: 2, 2: 1}, {1: ("a", True), 2: ("b", True)}))
@example(({7: 7}, {7: ("a", True)}))
@example(({3: 4, 4: 5, 5: 3, 6: 3}, {3: ("a", True), 4: ("b", False), 5: ("c", True)}))
def test_a_program_finds_what_was_mapped_and_nothing_else(situation: tuple[dict[int, int], Table]) -> None:
    wanted, table = situation
    strays = [fd for fd, (_, cloexec) in table.items() if not cloexec]
    final = performed(plan(wanted, strays), table)
    assert after_exec(final) == {target: table[source][0] for target, source in wanted.items()}


@settings(max_examples=100, deadline=None)
@given(situations(), st.sets(numbers))
def test_reserved_numbers_are_never_touched(
    situation: tuple[dict[int, int], Table], reserved: set[int]
) -> None:
    wanted, table = situation
    reserved -= {*wanted, *wanted.values()}
    strays = [fd for fd, (_, cloexec) in table.items() if not cloexec]
    for action in plan(wanted, strays, reserved):
        touched = action.target if isinstance(action, Dup) else action.fd
        assert touched not in reserved


def test_a_plan_without_conflicts_has_one_action_for_each_number() -> None:
    assert plan({0: 10, 1: 11, 2: 11}, strays=[12]) == [Dup(10, 0), Dup(11, 1), Dup(11, 2), Close(12)]


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (-1, ValueError, "negative"),
        (True, TypeError, "int"),
        ("3", TypeError, "int"),
        (1, ValueError, "twice: in fds, and as stdout"),
        (64, ValueError, "below 64"),
    ],
)
def test_impossible_numbers_are_refused_with_the_reason(number: Any, error: Any, reason: str) -> None:
    check_targets([0, 63], {1: "stdout"}, 64)
    with pytest.raises(error, match=reason):
        check_targets([number], {1: "stdout"}, 64)
