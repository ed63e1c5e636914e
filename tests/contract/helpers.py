"""Functions that contract tests run in workers, importable there by reference."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any


def square(number: int) -> int:
    return number * number


def read_all(file: Any) -> Any:
    return file.read()


def die(how: int) -> None:
    """End this worker by a signal (positive) or exit code (zero or negative)."""
    if how > 0:
        os.kill(os.getpid(), how)
        signal.pause()
    os._exit(-how)


def touch_and_wait(path: str, gate: Any) -> str:
    """Say that we run by making a file, then wait until the gate (a pipe's reading end) ends."""
    Path(path).touch()
    gate.read()
    return path


def echo_once(connection: socket.socket) -> int:
    with connection:
        data = connection.recv(1024)
        connection.sendall(data.upper())
        return len(data)


def open_numbers() -> dict[int, str]:
    """This worker's open descriptors and what they are."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
    return found


def spin(seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass
    return os.getpid()


class NeedsTwo(Exception):
    """An exception that its own `args` cannot rebuild."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} and {second}")


def raise_needs_two() -> None:
    raise NeedsTwo("left", "right")


class ExplodesOnLoad:
    """Pickles well, and raises when loaded."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return _explode, (self.what,)


def _explode(what: str) -> None:
    if what == "exit":
        raise SystemExit(5)
    if what == "os._exit":
        os._exit(7)
    if what == "recursion":
        return _explode(what)
    raise RuntimeError(f"cannot be loaded: {what}")
