"""What a task may change of its worker, and the next one must not find changed: noticed and undone between messages.

    undone      working directory, umask, signal handlers and mask, timers, soft resource limits, the standard streams
                of `sys`, locale, environment (but what came with an import stays: a module may rely on it)
    not undone  user and group, priority, hard limits, descriptors 0 to 2, a standard stream of `sys` that was closed:
                then the worker is to be replaced

Runs in: a worker, in its main thread, after the answer has been sent, so that nobody waits for it. What can be asked
in 6 microseconds in all is asked after each message; the rest (`look_closely`) when there is time.
"""

from __future__ import annotations

import _locale
import os
import resource
import signal
import sys
from typing import Any

from . import _signals

# Without the real-time signals, which would double the time.
_NUMBERS = [number for number in _signals.EVERY if number < 32]
# They count processor time, so they are not due soon.
_SLOW_TIMERS = (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_FROM_OUTSIDE = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


class Surroundings:
    """As they are now, to be found so again."""

    def __init__(self) -> None:
        self._cwd = _cwd()
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._handlers = _handlers()
        self._mask = _signals.sigmask(signal.SIG_BLOCK, ())
        # Whether they run: then the initializer has set them, and they are its business.
        self._timers = {
            timer: any(_signals.getitimer(timer)) for timer in (signal.ITIMER_REAL, *_SLOW_TIMERS)
        }
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        self._open_streams = tuple(filter(_is_open, self._streams))
        self._environ = os.environ
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]  # bytes: to compare, none is decoded
        self._locale = _locale.setlocale(_locale.LC_ALL)
        self._modules = len(sys.modules)
        self._ids = (os.geteuid(), os.getegid())
        self._files = _standard_files()
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._limits = _limits()

    def put_back(self) -> str:
        """Undo what can be undone; returns what cannot, in words, or ""."""
        os.umask(self._umask)
        if not self._timers[signal.ITIMER_REAL]:
            _signals.setitimer(signal.ITIMER_REAL, 0)
        mask = _signals.sigmask(signal.SIG_BLOCK, ())
        if mask != self._mask:
            # What the task has kept waiting was its own, and would end the worker; but who wants that end is obeyed.
            for number in (_signals.sigpending() & set(_NUMBERS)) - self._mask - _FROM_OUTSIDE:
                signal.signal(number, signal.SIG_IGN)  # drops it
        if _handlers() != self._handlers:
            self._put_handlers_back()
        if mask != self._mask:
            _signals.sigmask(signal.SIG_SETMASK, self._mask)
        imported = len(sys.modules) != self._modules
        self._modules = len(sys.modules)
        os.environ = self._environ  # noqa: B003 - the object itself, not its contents
        if os.environ._data != self._environment:  # type: ignore[attr-defined]
            self._put_environment_back(imported)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        if (os.geteuid(), os.getegid()) != self._ids:
            return "it changed the worker's user or group"
        if not all(map(_is_open, self._open_streams)):
            return "it closed or detached the worker's sys.stdin, sys.stdout or sys.stderr"
        return self._put_cwd_back()

    def look_closely(self) -> str:
        """As `put_back`, for the rest."""
        for timer in _SLOW_TIMERS:
            if not self._timers[timer]:
                _signals.setitimer(timer, 0)
        if _locale.setlocale(_locale.LC_ALL) != self._locale:
            _locale.setlocale(_locale.LC_ALL, self._locale)
        if _standard_files() != self._files:
            return "it closed or replaced the worker's descriptors 0, 1 or 2"
        if os.getpriority(os.PRIO_PROCESS, 0) != self._priority:
            return "it changed the worker's priority"
        now = _limits()
        for which, before in self._limits.items():
            if now[which] != before:
                try:
                    resource.setrlimit(which, before)
                except (OSError, ValueError):
                    return "it lowered a resource limit of the worker's for good"
        return ""

    def _put_cwd_back(self) -> str:
        if _cwd() == self._cwd:
            return ""
        try:
            os.chdir(self._cwd)
        except OSError as error:
            return f"it changed the working directory, and there is no way back: {error}"
        return ""

    def _put_handlers_back(self) -> None:
        for number, handler in zip(_NUMBERS, self._handlers):
            if handler is not None and _signals.getsignal(number) is not handler:
                signal.signal(number, handler)

    def _put_environment_back(self, imported: bool) -> None:
        if imported:
            self._environment = dict(os.environ._data)  # type: ignore[attr-defined]
            return
        wanted = self._environment
        for name in [name for name in os.environb if name not in wanted]:
            del os.environb[name]
        os.environb.update(wanted)


def _handlers() -> list[Any]:
    return list(map(_signals.getsignal, _NUMBERS))  # 0.9 us; a loop in Python 1.3, in 280 bytecodes


def _is_open(stream: Any) -> bool:
    """False also if there is none, or if its buffer was detached. What wraps the buffer closes it as it goes."""
    try:
        return not stream.closed
    except Exception:
        return False


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # it has been removed


def _standard_files() -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for fd in (0, 1, 2):
        try:
            status = os.fstat(fd)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


def _limits() -> dict[int, tuple[int, int]]:
    return {which: resource.getrlimit(which) for which in _LIMITS}
