"""What each worker has begun, done and said: one shared area a slot, which outlives the worker.

A worker may die between receiving a task and beginning it. The task is then in no inbox and has no answer,
as if it had begun, but the area says that it had not: so the next worker can run it. Of tasks that came
together, the answers are written here one by one and sent together: none is lost if a later task kills the worker.

Words are stored one after the other and read without a lock. On processors that may show others a later store
before an earlier one, it is a matter of nanoseconds; where that could matter, the reader waits `SETTLE_S` first.
"""

from __future__ import annotations

import mmap
import os
import sys
from struct import Struct

from . import _platform, fds
from ._clock import CLOCK

AREA_BYTES = 64 * 1024
_WORD = Struct("<Q")
# Words; _STOP, _RECALL and _LAST are the client's to write.
_BEGUN, _STOP, _RECALL, _LOGGED, _CLAIMED, _STARTED, _SAID, _LAST, _GOING = range(9)
_TAIL_AT = 128
TAIL_BYTES = 2048
_LOG_AT = _TAIL_AT + TAIL_BYTES
LOG_BYTES = AREA_BYTES - _LOG_AT

#: After so long what another processor has stored is seen; a thousand times what it takes.
SETTLE_S = 100e-6


class Board:
    """The client's side: all areas.

    Attributes:
        fd: the shared file, for the supervisor to hand to workers; owned.
    """

    def __init__(self, slots: int) -> None:
        self.fd = fds.above_stdio(_platform.anonymous_file("fdpool-board"))
        try:
            os.ftruncate(self.fd, slots * AREA_BYTES)
            _platform.seal(self.fd, _platform.SEAL_SHRINK | _platform.SEAL_GROW | _platform.SEAL_SEAL)
            self._areas = fds.mapped(self.fd, slots * AREA_BYTES, mmap.MAP_SHARED, writable=False)
        except BaseException:
            os.close(self.fd)
            raise

    def begun(self, slot: int) -> int:
        """The task that the slot's worker began last; 0 for none."""
        return self._word(slot, _BEGUN)

    def running(self, slot: int) -> tuple[int, float]:
        """The task that the slot's worker is in, and when it began, by the `CLOCK`; (0, 0.0) for none."""
        started = self._word(slot, _STARTED)
        begun = self._word(slot, _BEGUN)
        if not started or self._word(slot, _STARTED) != started:
            return 0, 0.0
        return begun, started / 1e9

    def said(self, slot: int) -> str:
        """The end of what the slot's workers have written to stderr, as far as Python wrote it."""
        total = self._word(slot, _SAID)
        start = slot * AREA_BYTES + _TAIL_AT
        ring = self._areas[start : start + TAIL_BYTES]
        at = total % TAIL_BYTES
        return (ring[:at] if total < TAIL_BYTES else ring[at:] + ring[:at]).decode("utf-8", "replace")

    def claimed(self, slot: int) -> int:
        """The item behind the last that the slot's worker has begun, or is about to, of the chunk that it runs."""
        return self._word(slot, _CLAIMED)

    def logged(self, slot: int) -> bytes:
        """The answers that are written and perhaps not sent, as in an ANSWERS message, without its header.

        Of a living worker: only if it does not write any just now, or these are none.
        """
        start = slot * AREA_BYTES + _LOG_AT
        return self._areas[start : start + self._word(slot, _LOGGED)]

    def ask_to_stop(self, slot: int, task: int) -> None:
        """Leave word for the slot's worker that `task`, and no other, is to stop; it looks when it is woken."""
        self._leave_word(slot, _STOP, task)

    def asked_to_stop(self, slot: int) -> int:
        """The task that was last asked to stop; 0 for none."""
        return self._word(slot, _STOP)

    def recall(self, slot: int, begun: int) -> None:
        """Ask the slot's worker to begin no more tasks that came together with `begun`, which it runs; or, if that is
        a chunk, none of its items that are not `claimed` by then.

        `SETTLE_S` later: if `begun` is what it was, nothing more will begin. If it is not, the worker went on; and it
        may have seen this as it was about to begin the next, and then it says RETURNED.
        """
        self._leave_word(slot, _RECALL, begun)

    def end_after(self, slot: int, task: int) -> None:
        """Ask the slot's worker to receive nothing more once `task`, which it runs, has ended, and to leave. If that
        still runs `SETTLE_S` later, so it will be."""
        self._leave_word(slot, _LAST, task)

    def is_going(self, slot: int) -> bool:
        """True if the slot's worker takes no more tasks, and is about to end."""
        return self._word(slot, _GOING) != 0

    def clear(self, slot: int) -> None:
        """A worker is about to be started for the slot: nothing has begun there. One that is tried again has the number
        that it had, and must not be taken for what the last worker died of."""
        for index in (_STARTED, _BEGUN, _LAST, _GOING):
            self._leave_word(slot, index, 0)

    def close(self) -> None:
        """Close file and mapping; safe to call again."""
        if self.fd >= 0:
            self._areas.close()
            fd, self.fd = self.fd, -1  # in this order: a fork may come between
            os.close(fd)

    def _word(self, slot: int, index: int) -> int:
        word: int = _WORD.unpack_from(self._areas, slot * AREA_BYTES + index * _WORD.size)[0]
        return word

    def _leave_word(self, slot: int, index: int, word: int) -> None:
        os.pwrite(self.fd, _WORD.pack(word), slot * AREA_BYTES + index * _WORD.size)


#: Runs in: a worker. Its own area.
here: Page | None = None


class Page:
    """The worker's side: its own area and no other. To be made while the process has one thread.

    Args:
        fd: the board's file; borrowed.
        slot: whose area.

    Attributes:
        slot: the same.
    """

    def __init__(self, fd: int, slot: int) -> None:
        self._area = _map_area(fd, slot)
        self._words = memoryview(self._area)[:_TAIL_AT].cast("Q")
        self._used = 0
        self.slot = slot
        self._words[_STARTED] = self._words[_SAID] = 0
        self.forget_log()

    def enter(self) -> None:
        """Runs in: the worker whose it is."""
        global here
        here = self

    def close(self) -> None:
        """Unmap it, in a process that has made it for a worker."""
        self._words.release()
        self._area.close()

    def begin(self, task: int) -> None:
        """Say that `task` begins now."""
        words = self._words
        words[_STARTED] = 0  # in this order: in between nothing runs, least of all the task before
        words[_BEGUN] = task
        words[_STARTED] = CLOCK.monotonic_ns()

    def may_begin(self, task: int, previous: int) -> bool:
        """Say that `task` begins now, unless the client wants nothing begun after the `previous` one."""
        words = self._words
        words[_STARTED] = 0  # as in begin
        words[_BEGUN] = task
        words[_STARTED] = CLOCK.monotonic_ns()
        return words[_RECALL] != previous  # in this order: see `Board.recall`

    def end(self) -> None:
        """Say that the task has ended, and only its answer is still to come."""
        self._words[_STARTED] = 0

    def is_last(self, task: int) -> bool:
        """True if nothing is to be received after `task`, which has ended."""
        return 0 != self._words[_LAST] == task

    def go(self) -> None:
        """Say that no more tasks are taken: the message that tells so may come from anybody who has the socket."""
        self._words[_GOING] = 1

    def say(self, data: bytes) -> None:
        """Note what is being written to stderr."""
        data = data[-TAIL_BYTES:]
        said = self._words[_SAID]
        at = said % TAIL_BYTES
        first = data[: TAIL_BYTES - at]
        rest = data[len(first) :]
        self._area[_TAIL_AT + at : _TAIL_AT + at + len(first)] = first
        self._area[_TAIL_AT : _TAIL_AT + len(rest)] = rest
        self._words[_SAID] = said + len(data)

    def claim(self, task: int, start: int, end: int) -> bool:
        """Say that items up to `end` of the chunk `task` begin now, unless the client has recalled it."""
        words = self._words
        words[_CLAIMED] = end  # in this order, as in may_begin
        if words[_RECALL] == task:
            words[_CLAIMED] = start
            return False
        return True

    def log(self, record: bytes) -> bool:
        """Write down an answer, header and body; False if there is no room."""
        start = self._used
        end = start + len(record)
        if end > LOG_BYTES:
            return False
        self._area[_LOG_AT + start : _LOG_AT + end] = record
        self._words[_LOGGED] = self._used = end
        return True

    def forget_log(self) -> None:
        """Everything written down has been sent."""
        self._words[_LOGGED] = self._used = 0

    def is_to_stop(self) -> bool:
        """True if the client has asked for the end of the task that runs now."""
        task = self._words[_STOP]
        return task != 0 and task == self._words[_BEGUN]


def _map_area(fd: int, slot: int) -> mmap.mmap:
    """A slot's area, to be written to. No descriptor of the board is left beside `fd`: by that one could write to the
    areas of all others."""
    offset = slot * AREA_BYTES
    if sys.version_info >= (3, 13):
        return fds.mapped(fd, AREA_BYTES, mmap.MAP_SHARED, offset=offset)
    with fds.standard_numbers_taken():
        # The mapping duplicates `fd`, and says nowhere to what number. As any duplicate, that is the lowest free one.
        number = os.dup(fd)
        os.close(number)
        area = fds.mapped(fd, AREA_BYTES, mmap.MAP_SHARED, offset=offset)
    if os.path.sameopenfile(number, fd):
        # Not closed, but replaced: the mapping closes this number when it goes.
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, number, inheritable=False)
        os.close(null)
    return area
