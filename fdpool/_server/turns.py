"""One thread's turns: what others post to it, what becomes readable, and what its time has come for.

`post` and `is_over` are for any thread, and for signal handlers; all else is for the thread that takes the turns.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Callable

from .._clock import CLOCK
from .._links import Waker
from ..fds import HasFileno, made_above_stdio

Action = Callable[[], object]


class Turns:
    """Calls what is to be called, in one thread.

    Attributes:
        is_over: no more turns are taken; what is posted is not done.
    """

    def __init__(self) -> None:
        self._posted: deque[Action] = deque()
        self._timers: list[tuple[float, Action]] = []
        self._waker = Waker()
        self._selector = made_above_stdio(selectors.DefaultSelector)
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.clear)
        self.is_over = False

    def post(self, action: Action) -> bool:
        """Have `action` called in the next turn; False if there is none any more. Never waits."""
        self._posted.append(action)
        # The waker's end may be closed meanwhile: it closes last, and a wake of a closed one does nothing.
        if not self.is_over:
            self._waker.wake()
        return not self.is_over

    def later(self, pause_s: float, action: Action) -> None:
        """Have `action` called in a turn after so many seconds."""
        self._timers.append((CLOCK.monotonic() + pause_s, action))

    def every(self, pause_s: float, action: Action) -> None:
        """Have `action` called now, and every so many seconds."""
        action()
        self.later(pause_s, lambda: self.every(pause_s, action))

    def watch(self, source: int | HasFileno, action: Action) -> None:
        """Have `action` called whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, action)

    def unwatch(self, source: int | HasFileno) -> None:
        """Do not look at `source` any more; before it is closed (hazard M27)."""
        self._selector.unregister(source)

    def take(self, until: float | None) -> None:
        """One turn: wait for something to do, but not beyond the moment `until`; and do it."""
        for key, _ in self._selector.select(self._timeout_s(until)):
            # One before it may have ended that: it is not watched any more then, or something else is by its number.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        while self._posted:
            self._posted.popleft()()
        now = CLOCK.monotonic()
        for timer in [timer for timer in self._timers if timer[0] <= now]:
            self._timers.remove(timer)
            timer[1]()

    def _timeout_s(self, until: float | None) -> float | None:
        if self._posted:
            return 0.0
        moments = [moment for moment, _ in self._timers] + ([] if until is None else [until])
        return max(0.0, min(moments) - CLOCK.monotonic()) if moments else None

    def close(self) -> None:
        """No more turns are taken; what was posted too late is not done."""
        self.is_over = True
        self._selector.close()
        self._waker.close()
        self._posted.clear()
