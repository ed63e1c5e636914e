"""What every test gets: it fails if it leaves a descriptor or a child process behind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


def open_descriptors() -> dict[int, str]:
    """Number and target of each descriptor of this process."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the one that listed the folder
    return found


def children() -> dict[int, str]:
    """Pid and name of each descendant of this process, zombies included."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[process.pid] = " ".join(process.cmdline()[:3]) or process.name()
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Return as soon as `condition()` is true; fail the test if that takes too long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waited for did not come"
        time.sleep(0.001)


def seconds_until_gone(processes: list[psutil.Process], limit_s: float = 5.0) -> float:
    """How long it takes until all of them are dead; a zombie is, whoever is slow to reap it."""
    begun = time.monotonic()
    wait_until(lambda: not any(_lives(process) for process in processes), limit_s)
    return time.monotonic() - begun


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
