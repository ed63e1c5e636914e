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
    """A locked file, and a FIFO through which the tasks say that they have come."""

    path: str
    fifo: str
    file: IO[str]

    def open(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def shut(self) -> None:
        """Wait until no task passes any more, and lock it."""
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def heard(self, length: int) -> str:
        """What tasks wrote into the FIFO: waits for at least `length` characters."""
        said = ""
        while len(said) < length:
            with open(self.fifo) as fifo:
                said += fifo.read()
        return said


@contextmanager
def gate() -> Iterator[Gate]:
    """A shut gate. It is opened at the end, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="fdpool-bench-") as folder:
        fifo = str(Path(folder, "fifo"))
        os.mkfifo(fifo)
        with open(Path(folder, "gate"), "w") as file:
            made = Gate(file.name, fifo, file)
            made.shut()
            yield made
