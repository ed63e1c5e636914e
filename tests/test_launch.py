"""`_launch`: by which file actions a program gets its descriptors, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fdpool import _launch
from fdpool._launch import Launch

CLOSE_FROM = 99


@pytest.fixture
def stray() -> Iterator[int]:
    """A descriptor that a task has left inheritable."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(fd, True)
    yield fd
    os.close(fd)


def actions(numbers: dict[int, int], kept: frozenset[int] = frozenset()) -> list[tuple[int, ...]]:
    return _launch._file_actions(Launch([b"true"], numbers, kept))


def test_a_program_with_the_standard_streams_alone_has_all_others_closed_at_once(
    stray: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_CLOSE_FROM", CLOSE_FROM)
    assert actions({0: stray}, frozenset({1, 2})) == [(os.POSIX_SPAWN_DUP2, stray, 0), (CLOSE_FROM, 3)]


@pytest.mark.parametrize("close_from", [None, CLOSE_FROM])
def test_with_others_each_that_it_is_not_to_have_is_closed_by_itself(
    stray: int, close_from: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_CLOSE_FROM", close_from)
    wanted = {0: stray, 1: stray, 2: stray, stray + 1: stray}
    assert (os.POSIX_SPAWN_CLOSE, stray) in actions(wanted)


def test_where_no_descriptor_can_be_closed_from_a_number_on_the_strays_are_looked_for(
    stray: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_CLOSE_FROM", None)
    assert (os.POSIX_SPAWN_CLOSE, stray) in actions({0: stray}, frozenset({1, 2}))
