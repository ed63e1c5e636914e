"""What runs in the workers that are stopped; without pytest, which each of them would import."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.contract import helpers

from . import points


def begin(name: str, folder: str) -> None:
    """The initializer of each worker."""
    if name == "while it boots":
        points.reach(folder)
    elif name in points.POINTS:
        points.install(name, folder)


def work(ledger: str, number: int, stop_in: str | None) -> int:
    """A task that leaves its mark, and may be where its worker is to stop."""
    helpers.note(ledger, number)
    if stop_in is not None:
        points.reach(stop_in)
    return number * number


def work_with(ledger: str, number: int, stop_in: str | None, file: Any) -> int:
    assert file.read(3) == '"""'
    return work(ledger, number, stop_in)


def note_and_stop(ledger: str, folder: str, number: int) -> int:
    helpers.note(ledger, number)
    if number == 17:
        points.reach(folder)
    return number


def leave_program(ledger: str, stay: bool) -> None:
    """Starts one in a session of its own, with what tells whose it was; then the worker dies, unless the task is to
    stay."""
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ, setsid=True)
    with open(ledger, "a") as file:
        file.write(f"{pid}\n")
    if stay:
        time.sleep(1000)
    os._exit(3)


def first_of(number: int, file: Any) -> int:
    assert not file.closed
    return number


def stay(ledger: str) -> None:
    """Until SIGKILL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGURG])
    helpers.note(ledger, 1000)
    time.sleep(1000)
