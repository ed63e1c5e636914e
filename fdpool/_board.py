"""Which task each worker has begun: one shared page a slot, written by the worker, read by the client after a death.

A worker may die between receiving a task and beginning it. The task is then in no inbox and has no answer,
as if it had begun, but its page says that it had not: so the next worker can run it.
"""

from __future__ import annotations

import mmap
import os
from struct import Struct

from . import _platform, fds

_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY
_TASK = Struct("<Q")
_STOP_AT = 8  # where the client puts the task that is to stop; the worker only reads it


class Board:
    """The client's side: all pages.

    Attributes:
        fd: the shared file, for the supervisor to hand to workers; owned.
    """

    def __init__(self, slots: int) -> None:
        self.fd = fds.above_stdio(_platform.anonymous_file("fdpool-board"))
        try:
            os.ftruncate(self.fd, slots * _PAGE_BYTES)
            self._pages = mmap.mmap(self.fd, slots * _PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise

    def begun(self, slot: int) -> int:
        """The task that the slot's worker began last; 0 for none."""
        task: int = _TASK.unpack_from(self._pages, slot * _PAGE_BYTES)[0]
        return task

    def ask_to_stop(self, slot: int, task: int) -> None:
        """Leave word for the slot's worker that `task`, and no other, is to stop; it looks when it is woken."""
        os.pwrite(self.fd, _TASK.pack(task), slot * _PAGE_BYTES + _STOP_AT)

    def close(self) -> None:
        """Close file and mapping; safe to call again."""
        if self.fd >= 0:
            self._pages.close()
            os.close(self.fd)
            self.fd = -1


#: Runs in: a worker. Its own page.
here: Page | None = None


class Page:
    """The worker's side: its own page and no other.

    Args:
        fd: the board's file; borrowed.
        slot: whose page.
    """

    def __init__(self, fd: int, slot: int) -> None:
        global here
        self._page = mmap.mmap(fd, _PAGE_BYTES, mmap.MAP_SHARED, offset=slot * _PAGE_BYTES)
        here = self

    def begin(self, task: int) -> None:
        """Say that `task` begins now (0.2 microseconds, measured)."""
        _TASK.pack_into(self._page, 0, task)

    def is_to_stop(self) -> bool:
        """True if the client has asked for the end of the task that runs now."""
        began: int = _TASK.unpack_from(self._page, 0)[0]
        asked: int = _TASK.unpack_from(self._page, _STOP_AT)[0]
        return began == asked
