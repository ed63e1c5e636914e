"""How far a worker goes with the items of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fdpool import _chunks


class Guard:
    """A worker in which nobody forks."""

    in_task = False
    items: Iterator[Any] = iter(())

    def leave_if_forked(self, error: BaseException | None = None) -> None:
        pass


@pytest.mark.parametrize(("more", "reached"), [([], 7), ([True], 14), ([True] * 99, 28)])
def test_a_chunk_is_cut_when_its_time_is_over_and_later_while_there_is_more_to_do(
    monkeypatch: pytest.MonkeyPatch, more: list[bool], reached: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(_chunks, "CLOCK", SimpleNamespace(monotonic=lambda: now[0]))
    sent: list[Any] = []

    def take_a_millisecond(item: int) -> int:
        now[0] += 2**-10  # exactly
        return item

    def has_more() -> bool:
        return bool(more and more.pop())

    def flush(results: list[Any], _mixed: bool) -> None:
        sent.extend(results)

    end = _chunks.run(
        take_a_millisecond, range(100), False, 0, 100, lambda _start, _end: True, Guard(), flush, has_more
    )
    assert (end, sent) == (reached, list(range(reached)))
