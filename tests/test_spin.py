"""Looking before blocking: it ends, and where it is in vain it is given up."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from fdpool import _spin
from fdpool._spin import SPIN_S, Spin


class Clock:
    """Time that passes only when somebody gives way, or is said to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
        self.now = 100.0
        self.step_s = step_s
        monkeypatch.setattr(_spin, "CLOCK", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(_spin, "_yield", self.give_way)

    def give_way(self) -> None:
        self.now += self.step_s


def looks(spin: Spin, found_at: int | None = None) -> int:
    """How often it looks, if there is something from the given look on."""
    count = 0

    def ready(_timeout: int) -> bool:
        nonlocal count
        count += 1
        return found_at is not None and count >= found_at

    spin.look(ready)
    return count


def test_it_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2e-6)
    assert looks(Spin()) == pytest.approx(SPIN_S / 2e-6, abs=3)
    assert clock.now == pytest.approx(100 + SPIN_S, abs=1e-5)


def test_it_ends_by_the_real_clock() -> None:
    began = time.monotonic()
    looks(Spin())
    assert time.monotonic() - began < 5


def test_what_is_there_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 2e-6)
    assert looks(Spin(), found_at=1) == 1


def test_a_few_misses_end_it_until_messages_come_soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2e-6)
    spin = Spin()
    assert looks(spin, found_at=10) == 10
    tries = 0
    while looks(spin) > 1:
        tries += 1
        clock.now += 1  # it took a second to come
        spin.waited()
        assert tries < 50
    clock.now += 1
    spin.waited()
    assert looks(spin) == 1
    clock.now += SPIN_S  # looking would have met this one
    spin.waited()
    assert looks(spin) > 1


def test_where_others_run_it_gives_up_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Giving way takes a millisecond: somebody else has had the processor.
    clock = Clock(monkeypatch, 1e-3)
    spin = Spin()
    assert looks(spin) == 2
    messages = []
    for _ in range(5):
        count = 0
        while looks(spin) == 1:
            clock.now += 1e-6
            spin.waited()
            count += 1
        messages.append(count)
    assert messages == sorted(messages)
    assert messages[-1] > 8 * messages[0]
