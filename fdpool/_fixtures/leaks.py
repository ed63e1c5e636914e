"""`LeakCheck`: what a test has left behind, waited for, filtered, and put into words."""

from __future__ import annotations

import fnmatch
import gc
import time
from collections.abc import Iterable

from .._clock import CLOCK
from . import census, trace
from .census import Census, Leak

#: How long what is about to go may take: a thread that has been told to end, a child that is being reaped.
PATIENCE_S = 2.0


class LeakCheck:
    """Knows what there was when it was made; the fixture `leak_check` is one.

    Args:
        test: node id of the test, by which processes are known that have left this process's tree.
        ignored: patterns (`fnmatch`) of leaks that are none, as `allow` takes them.
    """

    def __init__(self, test: str, ignored: Iterable[str] = ()) -> None:
        self._test = test
        self._ignored = list(ignored)
        census.watch_shared_memory()
        self._before = census.take()

    def allow(self, pattern: str) -> None:
        """Let a leak be, if what the report would say of it fits `pattern` (`fnmatch`): "thread 'metrics'*".

        Raises:
            TypeError: it is no string.
        """
        if not isinstance(pattern, str):
            raise TypeError(f"leak_check.allow() takes a pattern such as \"thread 'name'*\", not {pattern!r}")
        self._ignored.append(pattern)

    def restart(self) -> None:
        """Take what there is now as the beginning: what has come so far is no leak."""
        self._before = census.take()

    def let_be(self, since: Census) -> None:
        """What has come since that census is no leak, and what had come before still may be."""
        self._before = census.added(self._before, since, census.take())

    def now(self) -> list[Leak]:
        """What is there now and was not at the beginning. Garbage counts, as long as it is not collected."""
        found = census.compare(self._before, census.take(), self._test)
        return [leak for leak in found if not self._is_ignored(leak)]

    def settled(self, patience_s: float = PATIENCE_S) -> list[Leak]:
        """What is left though garbage was collected and `patience_s` seconds have passed; at once if nothing is."""
        deadline = CLOCK.monotonic() + patience_s
        pause_s = 0.001
        while found := self.now():
            if CLOCK.monotonic() > deadline:
                break
            gc.collect()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return found

    def assert_clean(self, patience_s: float = PATIENCE_S) -> None:
        """Fail here and now if something is left.

        Raises:
            AssertionError: with the report.
        """
        found = self.settled(patience_s)
        if found:
            raise AssertionError(report(found))

    def _is_ignored(self, leak: Leak) -> bool:
        return any(fnmatch.fnmatchcase(str(leak), pattern) for pattern in self._ignored)


def report(leaks: Iterable[Leak]) -> str:
    """The leaks, one a line, with the places where descriptors were opened as far as that is known."""
    lines = ["the test has left behind:"]
    untraced = False
    for leak in leaks:
        lines.append(f"  {leak}")
        if leak.kind == "descriptor":
            opened = trace.opened_at(leak.number)
            lines += [f"      opened {place}" for place in opened]
            untraced = untraced or not trace.is_on()
    if untraced:
        lines.append("(--fdpool-trace tells where descriptors were opened)")
    return "\n".join(lines)
