"""What runs in the workers of a chaos. Each leaves its mark in the ledger first: one atomic append of a line."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import time
from typing import Any


def mark(ledger: Any, number: int) -> None:
    """Say that task `number` runs."""
    os.write(ledger.fileno(), b"%d\n" % number)


def mark_at(path: str, number: int) -> None:
    """The same for a task that carries no descriptor, so that it may travel with others."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"%d\n" % number)
    os.close(fd)


def tiny(path: str, number: int) -> int:
    mark_at(path, number)
    return number * 3


def carrying(ledger: Any, number: int) -> int:
    mark(ledger, number)
    return number * 3


def large(ledger: Any, number: int, data: bytes) -> tuple[int, bytes]:
    mark(ledger, number)
    return number, data[::-1]


def array(path: str, number: int, values: Any) -> Any:
    mark_at(path, number)
    values += number
    return values


def through_pipe(ledger: Any, number: int, end: Any) -> int:
    mark(ledger, number)
    with end:
        end.write(number.to_bytes(8, "little"))
    return number


def opens(ledger: Any, number: int) -> Any:
    mark(ledger, number)
    file = tempfile.TemporaryFile()
    file.write(number.to_bytes(8, "little"))
    file.seek(0)
    return file


def fails(path: str, number: int) -> None:
    mark_at(path, number)
    raise KeyError(number)


def runs_program(path: str, number: int) -> int:
    """A program of its own, in a session of its own; it may be killed, too."""
    mark_at(path, number)
    return subprocess.Popen(["sleep", "0.01"], start_new_session=True).wait()


def leaves_program(path: str, number: int) -> int:
    """One that it does not wait for: the pool has to find it."""
    mark_at(path, number)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return number


def nested(path: str, number: int) -> int:
    """A pool in a worker."""
    mark_at(path, number)
    import fdpool

    with fdpool.Pool(1) as pool:
        try:
            return pool.submit(pow, number, 2).result(30)
        except (fdpool.WorkerLost, fdpool.PoolBroken):  # its workers and its supervisor may be killed, too
            return number**2


def sleeps(path: str, number: int, seconds: float) -> int:
    mark_at(path, number)
    time.sleep(seconds)
    return number


def spins(path: str, number: int, seconds: float) -> int:
    """As one that computes; `sleeps` is interrupted in a system call."""
    mark_at(path, number)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass
    return number


def grows(path: str, number: int) -> int:
    """To 400 MB at most, as it is ended before that."""
    mark_at(path, number)
    held = []
    for _ in range(20):
        held.append(b"x" * (20 << 20))
        time.sleep(0.02)
    time.sleep(100)
    return number


def logs(path: str, number: int) -> int:
    mark_at(path, number)
    logging.getLogger(__name__).warning("task %d", number)
    return number


def shared_item(path: str, number: int, table: list[int], index: int) -> int:
    mark_at(path, number)
    return table[index]
