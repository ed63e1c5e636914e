"""What this process has open and who descends from it; waiting for conditions. Cheap to import in a worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


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
    import psutil

    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[process.pid] = " ".join(process.cmdline()[:3]) or process.name()
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    """Return once `condition()` is true, a hundredth of a second later at most; fail the test if it takes too long."""
    deadline = time.monotonic() + limit_s
    pause_s = 0.001
    while not condition():
        assert time.monotonic() < deadline, "what the test waited for did not come"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.1, 0.01)  # what takes long is asked for less often: conditions cost, too


def living(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes of these pids that are there still; a zombie is."""
    import psutil

    found = []
    for pid in pids:
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def seconds_until_gone(processes: list[psutil.Process], limit_s: float = 30.0) -> float:
    """How long it takes until all of them are dead; a zombie is, whoever is slow to reap it."""
    begun = time.monotonic()
    wait_until(lambda: not any(_lives(process) for process in processes), limit_s)
    return time.monotonic() - begun


def _lives(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
