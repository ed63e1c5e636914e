"""One descriptor kept back, so that the limit of open files is no dead end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .fds import above_stdio


class Reserve:
    """One descriptor kept back, so that at the limit of open files there is room for one more. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._closed = False
        self.fill()

    def fill(self) -> bool:
        """Have it, if a descriptor is free; True if it is there."""
        with self._lock:
            if self._fd is None and not self._closed:
                try:
                    self._fd = above_stdio(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
                except OSError:
                    return False
            return self._fd is not None

    def give(self) -> bool:
        """Let go of it, for whoever needs a descriptor now; False if it is not there."""
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        return fd is not None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let go of it for a while, for what opens no more than one at a time, and closes it: so it is there again
        afterwards, where no other thread opens anything."""
        self.give()
        try:
            yield
        finally:
            self.fill()

    def owned(self) -> list[int]:
        """Its number, if it is there; still owned as before."""
        fd = self._fd
        return [] if fd is None else [fd]

    def close(self) -> None:
        """Let go of it for good."""
        self._closed = True
        self.give()

    def forget(self) -> None:
        """Runs in a forked child: close the copy. Another thread may have held the lock at the fork, and nobody lets go
        of it here."""
        self._lock = threading.Lock()
        self.close()
