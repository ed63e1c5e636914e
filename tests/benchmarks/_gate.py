"""A gate at which tasks of any pool wait until the client opens it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Gate:
    """A locked file, and a FIFO into which each task that has come writes a line."""

    path: str
    fifo: str
    lock: IO[str]
    reader: int

    def open(self) -> None:
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def shut(self) -> None:
        """Wait until no task passes any more, and lock it."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def heard(self, count: int) -> list[str]:
        """The lines that tasks wrote: waits for so many."""
        said = b""
        while said.count(b"\n") < count:
            said += os.read(self.reader, 65536)
        return said.decode().splitlines()


@contextmanager
def gate() -> Iterator[Gate]:
    """A shut gate. It is opened at the end, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="fdpool-bench-") as folder:
        fifo = str(Path(folder, "fifo"))
        os.mkfifo(fifo)
        # Opened for both, so that there is no end of file between one writer and the next (fifo(7)).
        reader = os.open(fifo, os.O_RDWR)
        with open(Path(folder, "gate"), "w") as lock:
            made = Gate(lock.name, fifo, lock, reader)
            made.shut()
            try:
                yield made
            finally:
                made.open()
                os.close(reader)
