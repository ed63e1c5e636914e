"""Running the programs of one task in a worker: one poll(2) that sees their exits, their pipes and the clock.

    RUNNING ──all exited, all pipes at their end──► over
       │
       └─deadline, or told to end──► ending: SIGTERM, grace, SIGKILL until nothing is left ──► over

Everything is bounded once the end has begun, also where somebody beyond reach holds the pipes: what is in
them is read, and then they are closed.
"""

import os
import select
import signal
from collections.abc import Callable, Iterable
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple

from . import _platform, _progeny, _trees
from ._capture import Feeder, Sink
from ._clock import CLOCK
from ._launch import Launch, start
from ._progeny import Progeny
from ._signals import DEFAULT, EVERY, IGNORE, getsignal, set_handler, sigmask
from .fds import LONGEST_POLL_S, above_stdio

_AFTER_KILL_S = 2.0  # how long what was sent SIGKILL may take to die (a process in the kernel's hands)
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.05  # between looks for what else is left; its end wakes nobody


class Why(Enum):
    """Why a run ended, or will."""

    RUNNING = "running"  # it has not; or by itself
    TIMED_OUT = "timed out"
    TOLD = "told to end"


class Ended(NamedTuple):
    """One program's end: the status is None if it is beyond reach or somebody else reaped it."""

    status: int | None
    rusage: Any
    wall_s: float


class Alarm:
    """Makes poll(2) return for a signal: a descriptor that is readable once one of `numbers` has come.

    Runs in: a worker's main thread. Handlers and wake-up descriptor are put back by `close`.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.fd, self._tell = map(above_stdio, os.pipe())
        os.set_blocking(self._tell, False)
        self._wakeup_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        self._handlers = {number: set_handler(number, _nothing) for number in numbers}

    def clear(self) -> None:
        """Forget what came; there is something."""
        os.read(self.fd, 4096)

    def close(self) -> None:
        """Put everything back."""
        for number, handler in self._handlers.items():
            set_handler(number, DEFAULT if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fd)
        os.close(self._tell)


def _nothing(*_: object) -> None:
    pass


class Run:
    """The programs of one task, from their start until nothing of them is left that must end.

    Args:
        timeout: seconds from now; None for none.
        grace_s: between SIGTERM and SIGKILL.
        alarms: signals at which `on_alarm` is called.

    Use as a context manager: leaving it ends what still runs, at once, and reaps it.
    """

    def __init__(
        self,
        timeout: float | None,
        grace_s: float,
        alarms: Iterable[int] = (),
        on_alarm: "Callable[[Run], None] | None" = None,
    ) -> None:
        self._begun = CLOCK.monotonic()
        self._deadline = None if timeout is None else self._begun + timeout
        self._grace_s = grace_s
        self._on_alarm = on_alarm
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._alive: dict[int, int | None] = {}  # program -> its pidfd
        self._begins: dict[int, float] = {}
        self._walls: dict[int, float] = {}
        self._sinks: list[Sink] = []
        self._feeders: list[Feeder] = []
        self._kill_at = self._look_at = 0.0
        self._look_s = _FIRST_LOOK_S
        self._unseen = False  # some program has no pidfd
        self.why = Why.RUNNING
        self._alarm: Alarm | None = None
        wanted = set(alarms) if _has_pidfds() else {*alarms, signal.SIGCHLD}
        # With SIGCHLD ignored, which a task may have left so, the kernel throws exit statuses away (M38).
        self._ignored = getsignal(signal.SIGCHLD) == IGNORE
        if wanted:  # first, as it fails where no descriptor is left
            self._alarm = Alarm(wanted)
            self.watch(self._alarm.fd, select.POLLIN, self._alarmed)
        if self._ignored and signal.SIGCHLD not in wanted:
            set_handler(signal.SIGCHLD, DEFAULT)
        self.progeny = Progeny()

    # -- before it runs --------------------------------------------------------------------------------

    def start(self, launch: Launch) -> int:
        """Start one program; its pid, which stays valid until the run is closed.

        Raises:
            SpawnError: nothing was started.
        """
        # A handler that raises between the start and the note would leave a program that nobody knows.
        before = sigmask(signal.SIG_BLOCK, EVERY)
        try:
            begins = CLOCK.monotonic()  # when it has been started it has run for a while, or has ended
            pid = start(launch)
            self._begins[pid] = begins
            self.progeny.add(pid, leads_group=not launch.group)
            pidfd = _platform.open_pidfd(pid)
            self._alive[pid] = pidfd
            if pidfd is not None:
                self.watch(pidfd, select.POLLIN, lambda: self._exited(pid))
            else:
                self._unseen = True
        finally:
            sigmask(signal.SIG_SETMASK, before)
        return pid

    def capture(self, fd: int, most: int | None) -> Sink:
        """Collect what comes out of `fd`, which is taken."""
        sink = Sink(fd, most)
        self._sinks.append(sink)

        def read() -> None:
            sink.read()
            if not sink.open:
                self.forget(fd)

        self.watch(fd, select.POLLIN, read)
        return sink

    def feed(self, fd: int, data: bytes) -> None:
        """Write `data` into `fd`, which is taken."""
        feeder = Feeder(fd, data)
        self._feeders.append(feeder)

        def write() -> None:
            feeder.write()
            if not feeder.open:
                self.forget(fd)

        self.watch(fd, select.POLLOUT, write)

    def watch(self, fd: int, events: int, handler: Callable[[], None]) -> None:
        """Call `handler` whenever poll(2) reports `fd`, which is borrowed."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def forget(self, fd: int) -> None:
        """Watch `fd` no more; it may be closed already (poll(2) is told numbers each time)."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # -- running -----------------------------------------------------------------------------------------

    def until_over(self) -> Why:
        """Wait until every program has exited and every pipe is at its end, or all of it has been ended."""
        if self._on_alarm is not None:
            self._on_alarm(self)  # what came before anybody listened
        while not self._is_over(CLOCK.monotonic()):
            self._turn(self._wait_ms(CLOCK.monotonic()))
        return self.why

    def end(self, why: Why, grace_s: float | None = None) -> None:
        """Begin the end of everything that the programs are: SIGTERM, grace, SIGKILL. Does not wait."""
        if self.why is not Why.RUNNING:
            return
        self.why = why
        if grace_s is None:
            grace_s = self._grace_s
        self._look_at = CLOCK.monotonic()
        self._kill_at = self._look_at + grace_s
        if grace_s > 0:
            for number in _trees.TERMINATE:
                self.progeny.signal(number)

    def _turn(self, ms: float | None) -> bool:
        """Wait once and handle what came; False if nothing did."""
        ready = self._poll.poll(ms)
        for fd, _ in ready:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler()
        return bool(ready)

    def _is_over(self, now: float) -> bool:
        if self._unseen:
            self._look_for_exits()
        if self.why is Why.RUNNING:
            if not self._alive and not any(sink.open for sink in self._sinks):
                return True
            if self._deadline is None or now < self._deadline:
                return False
            self.end(Why.TIMED_OUT)
        if now < self._look_at:
            return False
        if not self._alive and not self.progeny.has_others:
            self._drain(now + _AFTER_KILL_S)
            return True
        if now >= self._kill_at:
            self.progeny.signal(signal.SIGKILL)
        self._look_at = now + self._look_s
        self._look_s = min(2 * self._look_s, _LONGEST_LOOK_S)
        return now >= self._kill_at + _AFTER_KILL_S

    def _wait_ms(self, now: float) -> float | None:
        moments = [self._look_at if self.why is not Why.RUNNING else self._deadline]
        if self._unseen:
            moments.append(now + _LONGEST_LOOK_S)
        at = min((at for at in moments if at is not None), default=None)
        return None if at is None else min(max(0.0, at - now), LONGEST_POLL_S) * 1000

    def _drain(self, until: float) -> None:
        """Read what is in the pipes. Who may still write into them is none of ours."""
        for feeder in self._feeders:
            self.forget(feeder.fd)
            feeder.close()
        while any(sink.open for sink in self._sinks) and self._turn(0) and CLOCK.monotonic() < until:
            continue

    def _exited(self, pid: int) -> None:
        pidfd = self._alive.pop(pid)
        self._walls[pid] = CLOCK.monotonic() - self._begins[pid]
        if pidfd is not None:
            self.forget(pidfd)
            os.close(pidfd)

    def _alarmed(self) -> None:
        assert self._alarm is not None
        self._alarm.clear()
        if self._on_alarm is not None:
            self._on_alarm(self)

    def _look_for_exits(self) -> None:
        for pid, pidfd in list(self._alive.items()):
            if pidfd is None and _progeny.ended(pid):
                self._exited(pid)

    # -- afterwards ----------------------------------------------------------------------------------------

    def reap(self) -> list[Ended]:
        """The ends of the programs, in the order of their starts."""
        found = []
        for pid in self.progeny.leaders:
            end = self.progeny.reap(pid, wait=pid not in self._alive)
            wall_s = self._walls.get(pid, CLOCK.monotonic() - self._begins[pid])
            status, usage = (None, None) if end is None else end
            found.append(Ended(status, usage, wall_s))
        return found

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is not None and self.progeny.leaders:
                self.end(Why.TOLD, 0.0)
                self._kill_at = min(self._kill_at, CLOCK.monotonic())
                while not self._is_over(CLOCK.monotonic()):
                    self._turn(self._wait_ms(CLOCK.monotonic()))
                self.reap()
        finally:
            self._close()

    def _close(self) -> None:
        if self._alarm is not None:
            self._alarm.close()
        for pidfd in self._alive.values():
            if pidfd is not None:
                os.close(pidfd)
        for sink in self._sinks:
            sink.close()
        for feeder in self._feeders:
            feeder.close()
        if self._ignored:
            set_handler(signal.SIGCHLD, IGNORE)
        self.progeny.close()


def _has_pidfds() -> bool:
    return hasattr(os, "pidfd_open") and _platform.has("pidfd")
