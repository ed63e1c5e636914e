"""`fds`: waiting for one descriptor, whatever the time."""

from __future__ import annotations

import os

import pytest

from fdpool import fds


def test_a_wait_may_be_longer_than_the_kernel_can_be_asked_for() -> None:
    """As poll(2) counts milliseconds in an int: 24 days."""
    reading, writing = os.pipe()
    os.close(writing)
    assert fds.is_readable(reading, 3e7)
    os.close(reading)


def test_a_wait_in_parts_ends_with_the_last_of_them_or_with_what_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fds, "LONGEST_POLL_S", 0.001)
    reading, writing = os.pipe()
    assert not fds.is_readable(reading, 0.0105)
    os.close(writing)
    assert fds.is_readable(reading, float("inf"))
    os.close(reading)
