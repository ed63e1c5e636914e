"""What workers have to say besides answers: what tasks have left behind in them, and log records.

Received with the answers, told by the pump: warnings and log handlers are user code.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque

from . import _leftovers, _messages
from ._leftovers import Leftovers
from ._log import log
from .stats import LeftStats

_KEPT = 100  # of the latest, for `stats`


class News:
    """Of one pool's workers.

    Attributes:
        left: what was left so far.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, bytes]] = deque()
        self.left = LeftStats(0, 0, 0, ())

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
                    self._tell_left(_leftovers.decode(body))
                else:
                    from . import _logs

                    _logs.handle(body)
            except BaseException:
                # Among others, a warning that somebody has made an error; and SystemExit would end the pump.
                log("fdpool", logging.WARNING, "a worker's news could not be told", exc_info=True)

    def _tell_left(self, left: Leftovers) -> None:
        text = left.describe()
        so_far = self.left
        self.left = LeftStats(
            so_far.descriptors + len(left.descriptors),
            so_far.threads + len(left.threads),
            so_far.children + len(left.children),
            (*so_far.latest, text)[-_KEPT:],
        )
        warnings.warn(text, ResourceWarning, stacklevel=2)
