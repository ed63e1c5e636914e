"""The one lock of a client: who may decide, and in which order what has happened is looked at.

Events are posted to a queue; whoever finds the lock free handles all of them, and whoever finds it taken
leaves its event to the holder, who looks again after releasing. So `post` never waits, and may be called
from a finalizer or a signal handler that interrupted a holder in the same thread.

In the main thread signals are blocked while the lock is held, as a handler that raises there (Ctrl-C) could
tear a decision in two. One that is delivered through another of the program's threads cannot be kept out;
then `torn` is told, rather than anything guessed.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

# The wrapper in `signal` makes an enum member of each number: 10 microseconds a pair of calls, 2 without.
_sigmask = getattr(importlib.import_module("_signal"), "pthread_sigmask", signal.pthread_sigmask)
_BLOCKED = tuple(
    int(getattr(signal, name))
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGQUIT",
        "SIGALRM",
        "SIGVTALRM",
        "SIGPROF",
        "SIGUSR1",
        "SIGUSR2",
    )
)


def block_signals() -> None:
    """Block, in this thread, the signals for which programs usually have handlers."""
    _sigmask(signal.SIG_BLOCK, _BLOCKED)


def unblock_signals() -> None:
    """Undo `block_signals`."""
    _sigmask(signal.SIG_UNBLOCK, _BLOCKED)


class Critical:
    """A lock with a queue of events.

    `with critical:` waits for the lock, and on leaving handles what was posted meanwhile.

    Args:
        handle: called with an event's arguments, lock held; must not wait.
        torn: called with what was raised in the middle of a decision, lock held.
    """

    def __init__(self, handle: Callable[..., None], torn: Callable[[BaseException], None]) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._masked = False
        self._events: deque[tuple[Any, ...]] = deque()
        self._handle = handle
        self._torn = torn

    @property
    def pending(self) -> bool:
        """True if an event waits to be handled."""
        return bool(self._events)

    @property
    def is_mine(self) -> bool:
        """True if this thread holds the lock: then a finalizer or handler has interrupted a decision."""
        return self._holder == threading.get_ident()

    def post(self, *event: Any) -> None:
        """Have `handle(*event)` called, now or by the present holder. Never waits; from any thread or handler."""
        self._events.append(event)
        self.drain()

    def drain(self) -> None:
        """Handle what is posted, unless another holds the lock."""
        while self._events:
            if not self._lock.acquire(blocking=False):
                return  # its holder will look again
            self._acquired()
            try:
                self.handle_posted()
            except BaseException as error:
                self._torn(error)
                raise
            finally:
                self._release()

    def handle_posted(self) -> None:
        """The caller holds the lock: handle everything that is posted."""
        events = self._events
        while events:
            self._handle(*events.popleft())

    def __enter__(self) -> None:
        if self.is_mine:
            raise RuntimeError(
                "a finalizer or a signal handler ran in the middle of a decision: it may submit, no more"
            )
        self._lock.acquire()
        self._acquired()

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            self._torn(error)
        self._release()
        self.drain()

    def _acquired(self) -> None:
        self._holder = threading.get_ident()
        if self._holder == _main_thread:
            block_signals()
            self._masked = True

    def _release(self) -> None:
        masked, self._masked = self._masked, False
        self._holder = None
        self._lock.release()
        if masked:
            unblock_signals()


_main_thread = threading.main_thread().ident
