"""What workers have to say besides answers: what tasks have left behind in them, and log records.

Received with the answers, told by the pump: warnings and log handlers are user code.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque

from . import _leftovers, _messages
from ._log import log
from .stats import LeftStats

_KEPT = 100  # of the latest, for `stats`


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
        self.left = LeftStats(0, 0, 0, ())
        self.strays = 0

    def __bool__(self) -> bool:
        """True if there is something to tell."""
        return bool(self._waiting)

    def put(self, kind: int, body: bytes) -> None:
        """Keep a LEFT or LOG message until `tell`."""
        self._waiting.append((kind, body))

    def tell(self) -> None:
        """Runs in: the pump, with signals let through. Warn, and log. Never raises."""
        while self._waiting:
            kind, body = self._waiting.popleft()
            try:
                if kind == _messages.LEFT:
                    self._tell_left(body)
                else:
                    from . import _logs

                    _logs.handle(body)
            except BaseException:
                # Among others, a warning that somebody has made an error; and SystemExit would end the pump.
                log("fdpool", logging.WARNING, "a worker's news could not be told", exc_info=True)

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
