"""The signals of a server that runs in the foreground, and what it tells systemd.

Runs in: the main thread. A handler only posts to the loop, so nothing can happen in the middle of anything.
"""

from __future__ import annotations

import itertools
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from .. import _children
from .._links import Waker
from .._systemd import Notifier

if TYPE_CHECKING:
    from .loop import Loop

_QUICK_S = 1.0  # what requests in flight have at a quick end

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class Signals:
    """Handles a server's signals while it is entered; the handlers that were there come back afterwards.

    What comes before `begin` is remembered, and done then; what comes after the server's end does nothing.

    Args:
        ends_process: nothing comes afterwards but the end of this process, so the signals are ignored then: to
            somebody who asks twice, a server that has ended well must not seem to have been killed. And nobody but
            fdpool starts children in it: those that it adopts, as process 1 does, are reaped as they die.

    Raises:
        RuntimeError: this is not the main thread.
    """

    def __init__(self, ends_process: bool = False) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "run() is for the main thread, which alone receives signals: use `with server:` here"
            )
        self._ends_process = ends_process
        self._notifier = Notifier()
        self._loop: Loop | None = None
        self._early: list[int] = []
        self._quick_ends = itertools.count()
        self._before: dict[int, Handler] = {}
        self._waker = Waker()
        self._wakeup_before = -1

    def __enter__(self) -> Signals:
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGQUIT,
            signal.SIGHUP,
            signal.SIGTTIN,
            signal.SIGTTOU,
            signal.SIGUSR1,
            signal.SIGUSR2,
            *((signal.SIGCHLD,) if self._ends_process else ()),
        ):
            self._before[number] = signal.signal(number, self._on_signal)
        # The kernel gives a signal to any thread that does not block it, and then nothing wakes the main thread, which
        # alone runs handlers: unless it waits for this descriptor.
        self._wakeup_before = signal.set_wakeup_fd(self._waker.write_fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # Not SIGCHLD: the kernel would reap a supervisor that somebody still waits for.
            ignored = self._ends_process and number != signal.SIGCHLD
            afterwards = signal.SIG_IGN if ignored else handler
            signal.signal(number, afterwards if afterwards is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before)
        self._waker.close()

    def begin(self, loop: Loop) -> None:
        """The loop runs: what has come meanwhile is done now."""
        self._loop = loop
        if self._notifier.watchdog_interval_s is not None:
            pause_s = self._notifier.watchdog_interval_s
            loop.turns.post(lambda: loop.turns.every(pause_s, self._notifier.watchdog))
        if self._ends_process:
            # Some may have died before their death was heard of: what a shell has started and then become this.
            self._early.append(signal.SIGCHLD)
        while self._early:
            self._do(loop, self._early.pop(0))

    def wait(self) -> None:
        """Return when the loop has ended; handlers run meanwhile, whichever thread gets their signals."""
        assert self._loop is not None
        poll = select.poll()
        poll.register(self._waker.fileno(), select.POLLIN)
        while self._loop.is_running:
            poll.poll()
            self._waker.clear()
        self._loop.wait()

    def hear(self, event: str) -> None:
        """Runs in: the loop. Wake who waits for its end; tell systemd what has become of the service."""
        if event == "ended":
            self._waker.wake()
        elif event in ("started", "reloaded"):
            self._notifier.ready()
        elif event == "reloading":
            self._notifier.reloading()
        elif event == "upgraded":
            pid = self._loop.succession.pid if self._loop is not None else None
            if pid is not None:
                self._notifier.main_pid(pid)
        elif event == "stopping":
            self._notifier.stopping()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        loop = self._loop
        if loop is None:
            self._early.append(number)
        else:
            self._do(loop, number)

    def _do(self, loop: Loop, number: int) -> None:
        if number == signal.SIGTERM:
            loop.stop()
        elif number in (signal.SIGINT, signal.SIGQUIT):
            # Counted in one step: the second one may come while the handler of the first is still here.
            loop.stop(0.0 if next(self._quick_ends) else _QUICK_S)
        elif number == signal.SIGHUP:
            loop.reload()
        elif number == signal.SIGTTIN:
            loop.scale(lambda wanted: wanted + 1)
        elif number == signal.SIGTTOU:
            loop.scale(lambda wanted: max(1, wanted - 1))
        elif number == signal.SIGUSR1:
            loop.reopen_logs()
        elif number == signal.SIGUSR2:
            loop.upgrade()
        elif number == signal.SIGCHLD:
            loop.turns.post(_children.reap_adopted)
