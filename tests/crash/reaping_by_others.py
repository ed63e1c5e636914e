"""To be preloaded: the supervisor's children are reaped by somebody else, as the environment says by whom."""

from __future__ import annotations

import ctypes
import os
import signal

from fdpool import _platform, _supervisor, _trees
from tests.process_state import wait_until

VARIABLE = "FDPOOL_TEST_REAPER"

_look, _listen = _trees.next_dead_child, _supervisor.Supervisor._listen_to_signals
_open, _opened = _platform.open_pidfd, list[int]()


def _come_too_late() -> int | None:
    """As where a library waits for any child."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        pass
    return _look()


def _listen_in_vain(self: _supervisor.Supervisor) -> None:
    """As where C code ignores SIGCHLD, so that the kernel reaps."""
    _listen(self)
    handler = ctypes.CDLL(None).signal
    handler.argtypes, handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler(signal.SIGCHLD, 1)  # SIG_IGN, and Python does not know


def _open_too_late(pid: int) -> int | None:
    """As where the second worker is quicker than its supervisor."""
    _opened.append(pid)
    if len(_opened) == 2:
        wait_until(lambda: not _trees.is_ours(pid))
    return _open(pid)


_who = os.environ.get(VARIABLE)
if _who == "library":
    _trees.next_dead_child = _come_too_late
elif _who in ("kernel", "quick kernel"):
    _supervisor.Supervisor._listen_to_signals = _listen_in_vain  # type: ignore[method-assign]
    if _who == "quick kernel":
        _platform.open_pidfd = _open_too_late
