"""The worker's ends of a program's pipes: what it writes is collected up to a limit, what it reads is fed to it."""

from __future__ import annotations

import os

_BLOCK_BYTES = 256 * 1024


class Sink:
    """Collects what comes out of a pipe, and goes on reading beyond the limit, so that nobody blocks.

    Args:
        fd: the reading end; owned.
        most: bytes to keep; None for all.

    Attributes:
        truncated: more came than was kept.
    """

    def __init__(self, fd: int, most: int | None) -> None:
        self.fd = fd
        self.truncated = False
        self._most = most
        self._size = 0
        self._blocks: list[bytes] = []

    @property
    def open(self) -> bool:
        """False once the last writer has gone."""
        return self.fd >= 0

    def read(self) -> None:
        """Take what is there; the caller has seen that there is something, or that the end is."""
        block = os.read(self.fd, _BLOCK_BYTES)
        if not block:
            self.close()
            return
        if self._most is not None and self._size + len(block) > self._most:
            self.truncated = True
            block = block[: self._most - self._size]
        if block:
            self._size += len(block)
            self._blocks.append(block)

    def close(self) -> None:
        """Read no more; what has come is kept. Safe to call again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def data(self) -> bytes:
        """What was kept."""
        return b"".join(self._blocks)


class Feeder:
    """Writes `data` into a pipe as its reader makes room, then closes it.

    Args:
        fd: the writing end; owned. Its description is this process's alone, so it may be made non-blocking.
    """

    def __init__(self, fd: int, data: bytes) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._rest = memoryview(data)

    @property
    def open(self) -> bool:
        """False once all is written, or nobody reads any more."""
        return self.fd >= 0

    def write(self) -> None:
        """Write what goes now. A reader that has gone wanted no more of it: that is no error (X5)."""
        try:
            if self._rest:
                self._rest = self._rest[os.write(self.fd, self._rest[:_BLOCK_BYTES]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._rest = self._rest[:0]
        if not self._rest:
            self.close()

    def close(self) -> None:
        """Write no more; safe to call again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
