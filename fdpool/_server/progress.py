"""How far a server worker has got, in memory that the server sees too: it need not be asked, so a busy
interpreter, or one that C code keeps from running, cannot fail to answer.

A file of one page, and behind it whatever faulthandler writes: at a fault, or when the worker is asked for its stacks.

    begun, finished     requests (connections, where the application is called with those) so far
    oldest              when the one that runs longest began, or last moved on; 0 if none runs
    beat                when the event loop last turned; 0 where there is none
    taken, open         connections taken from the inbox so far, and those that are open (handing over)
    waited_for          set by the server: it wants a word when a request has ended (handing over)
    threads             so many requests run at a time, and connections wait for one to end; 0 if it is not for that
"""

import mmap
import os
import threading
from typing import NamedTuple

from .. import _platform
from .._clock import CLOCK
from ..fds import above_stdio, mapped

STACKS_AT = mmap.PAGESIZE  # where in the file the stacks begin
_MOST_STACKS = 256 * 1024

BEGUN, FINISHED, _OLDEST, _BEAT, _TAKEN, _OPEN, _WAITED_FOR, _THREADS = range(8)


class Seen(NamedTuple):
    """What the server sees of a worker at a moment; the moments are of `time.monotonic`, in seconds."""

    begun: int
    finished: int
    oldest: float | None
    beat: float | None
    taken: int = 0
    open: int = 0

    @property
    def in_flight(self) -> int:
        """Requests begun and not finished."""
        return max(0, self.begun - self.finished)

    def stuck_s(self, now: float) -> float:
        """Seconds that the worker has gone without moving on: its oldest request, or its event loop."""
        since = [moment for moment in (self.oldest, self.beat) if moment is not None]
        return max(0.0, now - min(since)) if since else 0.0


class _Page:
    """The file, mapped. Words are written and read whole: they are aligned (checked by no lock)."""

    def __init__(self, fd: int) -> None:
        self._map = mapped(fd, mmap.PAGESIZE, mmap.MAP_SHARED)
        self._words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Unmap it; safe to call again."""
        self._words.release()
        self._map.close()


class SeenPage(_Page):
    """The server's side. Makes the file, whose descriptor is its own until `close`."""

    def __init__(self) -> None:
        self.fd = above_stdio(_platform.anonymous_file("fdpool-server"))
        self._read_to = STACKS_AT
        try:
            os.ftruncate(self.fd, mmap.PAGESIZE)
            # Its worker has the descriptor. Not against growing: faulthandler writes behind the page.
            _platform.seal(self.fd, _platform.SEAL_SHRINK | _platform.SEAL_SEAL)
            super().__init__(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    def see(self) -> Seen:
        """How far the worker is."""
        words = self._words
        oldest, beat = words[_OLDEST], words[_BEAT]
        return Seen(
            words[BEGUN],
            words[FINISHED],
            oldest / 1e9 if oldest else None,
            beat / 1e9 if beat else None,
            words[_TAKEN],
            words[_OPEN],
        )

    def load(self) -> tuple[int, int]:
        """Connections that it has taken so far, and that are open now; looked at for each connection handed over."""
        return self._words[_TAKEN], self._words[_OPEN]

    def is_busy(self, waiting: int = 0) -> bool:
        """True if none of its threads is free for one more than so many connections that wait to be taken; looked at
        as `load` is."""
        words = self._words
        return 0 < words[_THREADS] <= words[BEGUN] - words[FINISHED] + waiting

    def wait_for_end(self, wanted: bool) -> None:
        """Have the worker say when its next request has ended, or no longer."""
        self._words[_WAITED_FOR] = int(wanted)

    def stacks(self) -> str:
        """What faulthandler has written since this was last called."""
        found = os.pread(self.fd, _MOST_STACKS, self._read_to)
        self._read_to += len(found)
        return found.decode(errors="replace")

    def close(self) -> None:
        """Unmap and close the file; safe to call again."""
        super().close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # in this order: a fork may come between
            os.close(fd)


class Progress(_Page):
    """The worker's side: what runs in it, told as it changes. Thread-safe.

    Args:
        fd: of the server's file; borrowed.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()
        self._running: dict[int, int] = {}  # to when it moved on, the longest ago first
        self.begun = 0
        self.finished = 0

    @property
    def in_flight(self) -> int:
        """Requests begun and not finished, by `begin` and `end`."""
        return self.begun - self.finished

    @property
    def waited_for(self) -> bool:
        """True if the server wants to know when a request has ended."""
        return bool(self._words[_WAITED_FOR])

    @property
    def counts(self) -> memoryview:
        """Where an event loop writes at `BEGUN` and `FINISHED` how many requests are: nobody asks how long each takes,
        and it has one thread. In place of `begin` and `end`, until `close`."""
        return self._words

    def took(self) -> None:
        """A connection was taken from the inbox; in one thread."""
        self._words[_TAKEN] += 1

    def has_open(self, connections: int) -> None:
        """So many connections are open."""
        self._words[_OPEN] = connections

    def has_open_what_runs(self) -> None:
        """As many connections are open as requests run. Counted and told in one step: of two threads, the one that has
        counted before the other would tell after it."""
        with self._lock:
            self._words[_OPEN] = self.in_flight

    def runs_at_most(self, threads: int) -> None:
        """While so many requests run, connections are left to others."""
        self._words[_THREADS] = threads

    def begin(self) -> int:
        """A request begins; returns its token. `end` it, whatever becomes of it."""
        with self._lock:
            self.begun += 1
            token = self.begun
            self._running[token] = CLOCK.monotonic_ns()
            self._words[BEGUN] = token
            self._tell_oldest()
        return token

    def touch(self, token: int) -> None:
        """The request has moved on (a part of its answer has gone, say): its time begins anew."""
        with self._lock:
            if self._running.pop(token, None) is not None:
                self._running[token] = CLOCK.monotonic_ns()
                self._tell_oldest()

    def end(self, token: int) -> int:
        """The request is over; returns how many are."""
        with self._lock:
            self._running.pop(token, None)
            self.finished += 1
            self._words[FINISHED] = self.finished
            self._tell_oldest()
            return self.finished

    def beat(self) -> None:
        """The event loop has turned."""
        self._words[_BEAT] = CLOCK.monotonic_ns()

    def beats_no_more(self) -> None:
        """There is no event loop any more: what comes after it is not to be taken for one that stands still."""
        self._words[_BEAT] = 0

    def _tell_oldest(self) -> None:
        self._words[_OLDEST] = next(iter(self._running.values()), 0)
