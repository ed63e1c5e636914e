"""What workers have to say besides answers: what tasks have left behind in them, and log records.

Received with the answers, told by the pump: warnings and log handlers are user code, and may be slower than workers
log. As long as the pump alone receives, it receives no more then, and workers wait for it (`_logs`). A thread that
waits for a result goes on, though, as a handler may want a lock that it has; so what is kept has a bound.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque

from . import _leftovers, _messages
from ._clock import CLOCK
from ._log import log
from .stats import LeftStats

_KEPT = 100  # of the latest, for `stats`
#: Most bytes of log records that wait; beyond, all are dropped until half of it is told: so that they are missing in
#: one place, and one line says it. A record has about a thousand.
_MOST_BYTES = 16 << 20
_DROPPED = -1  # a kind of message of our own, in the place of those that are missing


class News:
    """Of one pool's workers.

    Attributes:
        logs: whether they were asked for log records, which are pickles: else there are none of them.
        left: what was left so far.
        strays: LEFT messages that no worker has sent.
    """

    def __init__(self, logs: bool) -> None:
        self.logs = logs
        self._waiting: deque[tuple[int, bytes]] = deque()
        # Each counted up by one thread at a time: who receives, and the pump.
        self._put_bytes = self._told_bytes = 0
        self._dropped = self._told_dropped = 0
        self._full = False
        self.left = LeftStats(0, 0, 0, ())
        self.strays = 0

    def __bool__(self) -> bool:
        """True if there is something to tell."""
        return bool(self._waiting)

    def put(self, kind: int, body: bytes) -> None:
        """Keep a LEFT or LOG message until `tell`; or drop a LOG message. The caller is the only one that receives."""
        if kind == _messages.LOG:  # of the others there is one a task at most, and `left` is to be true
            was_full = self._full
            most = _MOST_BYTES // 2 if was_full else _MOST_BYTES
            self._full = self._put_bytes - self._told_bytes > most
            if self._full:
                self._dropped += 1
                if was_full:
                    return
                kind, body = _DROPPED, b""
        self._put_bytes += len(body)
        self._waiting.append((kind, body))

    def tell(self, until: float = math.inf) -> None:
        """Runs in: the pump, with signals let through. Warn, and log: once at least, and no more after the moment
        `until`. Never raises."""
        while self._waiting:
            kind, body = self._waiting.popleft()
            self._told_bytes += len(body)
            try:
                if kind == _messages.LEFT:
                    self._tell_left(body)
                elif kind == _DROPPED:
                    self._tell_dropped()
                else:
                    from . import _logs

                    _logs.handle(body)
            except BaseException:
                # Among others, a warning that somebody has made an error; and SystemExit would end the pump.
                log("fdpool", logging.WARNING, "a worker's news could not be told", exc_info=True)
            if CLOCK.monotonic() >= until:
                return

    def _tell_dropped(self) -> None:
        count, self._told_dropped = self._dropped - self._told_dropped, self._dropped
        text = "%d log records of workers were dropped: the log handlers of this process are slower than workers log"
        log("fdpool", logging.WARNING, text, count)

    def _tell_left(self, body: bytes) -> None:
        try:
            left = _leftovers.decode(body)
        except ValueError:
            self.strays += 1
            return
        text = left.describe()
        so_far = self.left
        self.left = LeftStats(
            so_far.descriptors + left.descriptors.number,
            so_far.threads + left.threads.number,
            so_far.children + left.children.number,
            (*so_far.latest, text)[-_KEPT:],
        )
        warnings.warn(text, ResourceWarning, stacklevel=2)
