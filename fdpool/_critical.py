"""The one lock of a client: who may decide, and in which order what has happened is looked at.

Events are posted to a queue; whoever finds the lock free handles all of them, and whoever finds it taken
leaves its event to the holder, who looks again after releasing. So `post` never waits, and may be called
from a finalizer or a signal handler that interrupted a holder in the same thread.

In the main thread signals are blocked from before the lock is taken until after it is free again, as a handler
that raises there (Ctrl-C) could tear a decision in two, or leave the lock taken. One that is delivered through
another of the program's threads cannot be kept out; then `torn` is told, rather than anything guessed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ._signals import Mask, sigmask

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
_HOW_MANY = len(_BLOCKED)

_BLOCK, _SET = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)
_last: Mask = sigmask(_BLOCK, ())


def block_signals() -> Mask:
    """Block, in a thread that runs no handlers, the signals for which programs usually have some; returns its mask
    before. Not where what runs as a thread is a greenlet in the main one (gevent): nobody would get them any more."""
    is_main = threading.get_native_id() == os.getpid()
    return sigmask(_BLOCK, () if is_main else _BLOCKED)


def block_in_main() -> Mask | None:
    """`block_signals` if this is the main thread, the only one that runs handlers; else None.

    A program may have blocked some of them itself (for sigwait(3), say), so that mask is what is to be put back.
    Where a handler that is due raises, nothing is blocked.
    """
    global _last
    if threading.get_ident() != _main_thread:
        return None
    try:
        # Runs the handlers that are due, too, which take the mask before along with what they raise. Then it is
        # taken to be what it was the last time: asking first costs a system call each time.
        before = sigmask(_BLOCK, _BLOCKED)
    except BaseException:
        sigmask(_SET, _last)
        raise
    if len(before) < _HOW_MANY:  # not a block within a block
        _last = before
    return before


def put_back(mask: Mask | None) -> None:
    """Undo what returned `mask`; a handler for what has come meanwhile runs in here, and may raise."""
    if mask is not None:
        sigmask(_SET, mask)


def mask_now() -> Mask:
    """This thread's mask."""
    return sigmask(_BLOCK, ())


Event = tuple[Callable[..., Sequence[Any]], tuple[Any, ...]]


class Critical:
    """A lock with a queue of events.

    An event is a function with its arguments. It is called with the lock held, must not wait, and returns actions.
    `with critical:` waits for the lock, and on leaving handles what was posted meanwhile.

    Args:
        perform: called with the actions that an event has returned, if any, lock held; must not wait.
        torn: called with what was raised in the middle of a decision, lock held.
    """

    def __init__(self, perform: Callable[[Any], None], torn: Callable[[BaseException], None]) -> None:
        # Never entered twice. It knows by itself who holds it, also where that was interrupted on the way in.
        self._lock: Any = threading.RLock()
        self._mask: Mask | None = None  # of the holder, to be put back
        self._events: deque[Event] = deque()
        #: Leaves an event to whoever handles events next. Never waits; from any thread or handler.
        self.leave: Callable[[Event], None] = self._events.append
        self._perform = perform
        self._torn = torn

    @property
    def pending(self) -> bool:
        """True if an event waits to be handled."""
        return bool(self._events)

    @property
    def is_mine(self) -> bool:
        """True if this thread holds the lock: then a finalizer or handler has interrupted a decision."""
        mine: bool = self._lock._is_owned()
        return mine

    def post(self, event: Callable[..., Sequence[Any]], *arguments: Any) -> None:
        """Have an event handled, now or by the present holder. Never waits; from any thread or handler."""
        mask = block_in_main()
        try:
            self.post_blocked(event, *arguments)
        finally:
            put_back(mask)

    def post_blocked(self, event: Callable[..., Sequence[Any]], *arguments: Any) -> None:
        """`post`, where the caller has called `block_in_main`."""
        self._events.append((event, arguments))
        self._drain()

    def drain(self) -> None:
        """Handle what is posted, unless another holds the lock."""
        if self._events:
            mask = block_in_main()
            try:
                self._drain()
            finally:
                put_back(mask)

    def _drain(self) -> None:
        lock = self._lock
        while self._events and not lock._is_owned():
            try:
                if not lock.acquire(False):  # by name it would cost twice as much
                    return  # its holder will look again
                self.handle_posted()
                lock.release()
            except BaseException as error:
                if lock._is_owned():
                    try:
                        self._torn(error)
                    finally:
                        lock.release()
                raise

    def handle_posted(self) -> None:
        """The caller holds the lock: handle everything that is posted."""
        events = self._events
        while events:
            event, arguments = events.popleft()
            actions = event(*arguments)
            if actions:
                self._perform(actions)

    def __enter__(self) -> None:
        if self.is_mine:
            raise RuntimeError(
                "a finalizer or a signal handler ran in the middle of a decision: it may submit, no more"
            )
        mask = block_in_main()
        try:
            self._lock.acquire()
            self._mask = mask
        except BaseException:
            if self.is_mine:
                self._lock.release()
            put_back(mask)
            raise

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        mask = self._mask
        try:
            if error is not None:
                self._torn(error)
        finally:
            try:
                self._lock.release()
                self._drain()
            finally:
                put_back(mask)


_main_thread = threading.main_thread().ident


def _note_main_thread() -> None:
    """Runs in: a forked child, whose one thread is its main thread, whichever it was."""
    global _main_thread
    _main_thread = threading.get_ident()


os.register_at_fork(after_in_child=_note_main_thread)
