"""What every test gets: it fails if it leaves a descriptor or a child process behind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process_state import children, open_descriptors, seconds_until_gone, wait_until

__all__ = ["children", "open_descriptors", "seconds_until_gone", "wait_until"]


# Collecting before each test costs 35 ms with what pytest has loaded, and next to nothing without.
gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare descriptors and children before and after; what cannot be collected and stays is a leak."""
    gc.collect()
    fds_before, children_before = open_descriptors(), children()
    yield
    if request.node.get_closest_marker("leaks"):
        return

    def leaked() -> tuple[dict[int, str], dict[int, str]]:
        now = open_descriptors()
        fds = {fd: what for fd, what in now.items() if fds_before.get(fd) != what}
        return fds, {pid: name for pid, name in children().items() if pid not in children_before}

    deadline = time.monotonic() + 2.0
    while any(leaked()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    fds, processes = leaked()
    assert not fds, f"descriptors left open: {fds}"
    assert not processes, f"processes left: {processes}"


@pytest.fixture
def as_other_uid() -> int:
    """The uid of nobody, for tests that need another user; skips where the process may not change to it."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    return 65534


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file of ten numbered lines."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    return path
