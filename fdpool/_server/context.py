"""What code in a server worker sees: its order, the worker that it is, and what every way of serving can do.

Runs in: a server worker, but for `Order`, which the server makes.
"""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from .._links import Waker
from .progress import Progress


class Order(NamedTuple):
    """What a worker is told at its start.

    Attributes:
        target: the application's name, or None if it is in `body`.
        body, spilled: the payload of (application, on_start, on_exit).
        interface: which kind of application it is, or None if the worker shall tell.
        max_requests: after so many it asks to be replaced.
        request_timeout_s: for event loops; others are watched by the server.
        reopens_logs: what it is forked from may have a log file open that has been moved away since.
        stands_by: it is to serve when it is called.
    """

    slot: int
    generation: int
    target: str | None
    body: bytes
    spilled: bool
    interface: str | None
    threads: int | None
    max_requests: int | None
    request_timeout_s: float | None
    backlog: int
    options: Mapping[str, Any]
    reopens_logs: bool = False
    stands_by: bool = False


class Face(Protocol):
    """One way of serving an application."""

    def serve(self, ready: Callable[[], None]) -> None:
        """Runs in: the main thread. Say `ready()` once connections are taken; return when drained."""

    def drain(self, grace_s: float, leaving: bool) -> None:
        """Runs in: the listening thread. Take nothing new, finish what runs, return from `serve`.

        Args:
            grace_s: after this, what still runs is cut off.
            leaving: the whole server goes, so idle connections are closed at once. Otherwise their clients are
                answered once more, and told to connect anew.
        """

    def close(self) -> None:
        """Close what it has opened, if it is not to serve."""


class ServerWorker:
    """The worker that code runs in: for hooks, and for applications that accept for themselves.

    Attributes:
        pid: the process.
        slot: its place among the workers, from 0.
        generation: 1, and one more with each reload.
    """

    def __init__(
        self, slot: int, generation: int, progress: Progress, tell: Callable[[object], None]
    ) -> None:
        self.pid = os.getpid()
        self.slot = slot
        self.generation = generation
        self.progress = progress
        self.interface = ""
        self.max_requests: int | None = None
        self._tell = tell
        self.is_ready = False
        self._retiring = False
        self._drained = threading.Event()
        self._waker = Waker()

    @property
    def draining(self) -> bool:
        """True once nothing new is to be taken."""
        return self._drained.is_set()

    def wait_drain(self, timeout: float | None = None) -> bool:
        """Wait until the worker is to drain; False if `timeout` seconds have passed instead."""
        return self._drained.wait(timeout)

    def fileno(self) -> int:
        """A descriptor that is readable once the worker is to drain; for selectors. Not to be read from."""
        return self._waker.fileno()

    def ready(self) -> None:
        """Say that connections are taken from now on; more than once does nothing."""
        if not self.is_ready:
            self.is_ready = True
            self._tell({"say": "ready", "interface": self.interface})

    def retire(self, why: str) -> None:
        """Ask to be replaced: another worker is started, and when it is ready, this one drains. Nothing is lost."""
        if not self._retiring:
            self._retiring = True
            self._tell({"say": "retire", "why": why})

    def closed(self) -> None:
        """Say that nothing new is accepted any more."""
        self._tell({"say": "closed"})

    def ended(self, finished: int) -> None:
        """A request is over, and so many are."""
        if self.max_requests is not None and finished >= self.max_requests:
            self.retire(f"it has served {finished} requests")

    def leave_if_forked(self) -> None:
        """A request may fork; a child that returns from it is not a worker, and must not go on as one."""
        if os.getpid() != self.pid:
            os._exit(1)

    def start_draining(self) -> None:
        """Nothing new is to be taken."""
        self._drained.set()
        self._waker.wake()

    def close(self) -> None:
        """Close what belongs to it."""
        self._waker.close()


_current: ServerWorker | None = None


def current_worker() -> ServerWorker | None:
    """The server worker that this process is, or None."""
    return _current


def become(worker: ServerWorker) -> None:
    """This process is `worker`."""
    global _current
    _current = worker
