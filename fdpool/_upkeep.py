"""Between tasks, in a worker: what they have changed is undone, what they have left is named, and it is seen whether
the worker has had its time.

Runs in: a worker. The answer has been sent by then, so nobody waits for it. After each message 10 microseconds; a
closer look, of 60 to 100, where the message took a millisecond, when there is nothing to do, and four times a second.
"""

from __future__ import annotations

import resource
import sys

from . import _platform
from ._clock import CLOCK
from ._leftovers import Leftovers, Watch
from ._messages import Recycling
from ._surroundings import Surroundings
from ._trees import CANNOT_LOOK

#: A message that took so long is followed by a closer look: 6 to 10 % of its time at most.
_CLOSE_LOOK_S = 0.001
#: A worker that short tasks keep busy without a pause takes a closer look so often.
_LOOK_EVERY_S = 0.25

#: What getrusage(2) counts the most memory in that a process has had.
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


class Upkeep:
    """One worker's. Made when the initializer has run: what that has changed and left is to stay.

    Attributes:
        over: the worker is to take no more tasks.
    """

    def __init__(self, rules: Recycling) -> None:
        self.over = False
        self._rules = rules
        self._surroundings = Surroundings()
        self._watch = Watch()
        self._tasks_left = rules.max_tasks
        self._name = ""
        self._unseen = 0  # tasks since the last closer look
        self._careful = True  # all of these are
        self._looked_at = CLOCK.monotonic()

    @property
    def has_unseen(self) -> bool:
        """True if tasks have run since the last closer look."""
        return self._unseen > 0

    def ran(self, name: str, tasks: int, busy_s: float, careful: bool = False) -> Leftovers | None:
        """So many tasks have run, the last of that name; returns what is to be told.

        Args:
            careful: what has run is one of `_leftovers.careful`. A look would be a sixth of what a short program
                costs its worker.
        """
        self._name = name
        self._unseen += tasks
        self._careful = self._careful and careful
        if self._tasks_left is not None:
            self._tasks_left -= tasks
            if self._tasks_left <= 0:
                self.over = True
                return None  # whatever was changed or left goes with it
        reason = self._surroundings.put_back()
        if reason or self._is_due(busy_s) or CLOCK.monotonic() - self._looked_at > _LOOK_EVERY_S:
            return self.look_closely(reason)
        return None

    def _is_due(self, busy_s: float) -> bool:
        """True if a message that took so long is to be followed by a closer look."""
        if busy_s < _CLOSE_LOOK_S:
            return False
        return not self._careful or _platform.has_children() or self._is_too_large()

    def look_closely(self, reason: str = "") -> Leftovers | None:
        """Look at all that there is; returns what is to be told."""
        rules, watch = self._rules, self._watch
        left = watch.look(self._name, self._unseen)
        reason = reason or self._surroundings.look_closely()
        if not reason and rules.max_fds_growth is not None and watch.descriptors_more > rules.max_fds_growth:
            reason = (
                f"it has {watch.descriptors_more} descriptors more than at first, and its max_fds_growth is "
                f"{rules.max_fds_growth}"
            )
        if reason:
            left = (left or Leftovers(self._name, self._unseen))._replace(reason=reason)
        self.over = self.over or bool(reason) or self._is_too_large()
        self._unseen = 0
        self._careful = True
        self._looked_at = CLOCK.monotonic()
        return left

    def _is_too_large(self) -> bool:
        most = self._rules.max_memory
        if most is None or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT <= most:
            return False  # it never was
        try:
            import psutil

            return bool(psutil.Process().memory_info().rss > most)
        except CANNOT_LOOK:  # a task has left no descriptor to look with: the next look may find one
            return False
