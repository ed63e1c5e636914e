"""The names that `fdpool run` is given, or reads from standard input as they come, so many to a job."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable

from .output import USAGE, Fatal, complain

_BLOCK_BYTES = 256 * 1024
# Many times what a path (PATH_MAX, 4096) or an argument (128 KiB, execve(2)) can have: a list of another kind. What has
# come of a name is copied with each block that is read; a list of 60 MB would take half a minute to be refused.
_LONGEST_BYTES = 1 << 20


class Names:
    """The names of the files.

    Args:
        given: them all; None to read them from standard input.
        separator: what ends each there.
        at_once: how many make a job; the last may have fewer.

    Attributes:
        ended: no more will come than are here.
        total: how many there are, or None if nobody knows yet.
    """

    def __init__(self, given: Iterable[str] | None, separator: bytes, at_once: int) -> None:
        self._ready = deque(os.fsencode(name) for name in given or ())
        self.ended = given is not None
        self.total = None if given is None else len(self._ready)
        self._separator = separator
        self._at_once = at_once
        self._rest = b""
        if given is None and os.isatty(0):
            complain("reading names of files from the terminal, one a line; Ctrl-D ends them")

    def known(self) -> list[bytes]:
        """The names that are here and have not been taken."""
        return list(self._ready)

    def has_batch(self) -> bool:
        """True if there are names for a job."""
        return bool(self._ready) and (self.ended or len(self._ready) >= self._at_once)

    def take_batch(self) -> list[bytes]:
        """The names of the next job."""
        return [self._ready.popleft() for _ in range(min(self._at_once, len(self._ready)))]

    def drop(self) -> bool:
        """Forget the rest; True if there is or may be one."""
        rest = bool(self._ready) or not self.ended
        self._ready.clear()
        self.ended = True
        return rest

    def read(self) -> list[bytes]:
        """Take what standard input has now; waits if that is nothing. The new names.

        Raises:
            Fatal: it cannot be read, or is no list of names.
        """
        try:
            block = os.read(0, _BLOCK_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Fatal(f"cannot read names from standard input: {error.strerror}", USAGE) from error
        *whole, self._rest = (self._rest + block).split(self._separator)
        if not block:
            self.ended = True
            whole = [self._rest]
        if len(self._rest) > _LONGEST_BYTES:
            reason = f"one has more than {_LONGEST_BYTES} bytes; they end with a newline, with -0 with NUL"
            raise Fatal(f"cannot read names from standard input: {reason}", USAGE)
        new = [name for name in whole if name]
        self._ready.extend(new)
        return new
