"""Waiting for the process that is to replace this one: until it serves, has failed, or has taken too long."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .._broken import describe_status
from .._clock import CLOCK
from .news import say
from .upgrade import Successor

if TYPE_CHECKING:
    from .listeners import Listeners
    from .turns import Turns

_LOOKS, _LOOK_S = 100, 0.05  # until one that will not serve is not waited for any more
# A server kills what is not done a second after its grace; a second more, and it is killed itself.
_MARGIN_S = 2.0
_IS_PROCESS_1 = (
    "no upgrade: this is process 1, whose end would be its container's and the successor's. "
    "Replace the container, or have an init in it (docker run --init)"
)


class Succession:
    """At most one successor at a time. Runs in: the server's thread.

    Args:
        limit_s: how long it may take until it serves.
        grace_s: how long what its workers run may take, once it is known that it will not.
        on_ready: called when it does.

    Attributes:
        pid: of the successor that serves, or None.
        served: at the listeners of how many slots it does.
    """

    def __init__(
        self,
        turns: Turns,
        listeners: Listeners,
        limit_s: float,
        grace_s: float,
        on_ready: Callable[[], object],
    ) -> None:
        self._turns = turns
        self._listeners = listeners
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._coming: Successor | None = None
        # Those that will not serve, and may not have ended yet: whose end is to say why; who was told to end, and when
        # it is killed.
        self._silent: set[Successor] = set()
        self._leaving: dict[Successor, float] = {}
        self.pid: int | None = None
        self.served = 0

    def begin(self) -> None:
        """Start a successor, if none is coming or there already."""
        if self._coming is not None or self.pid is not None:
            say("upgrade_refused", "a successor is on its way already", level=logging.WARNING)
            return
        if os.getpid() == 1:
            # Kernel: with process 1 of a pid namespace every other one in it is killed (pid_namespaces(7)).
            say("upgrade_refused", _IS_PROCESS_1, level=logging.WARNING)
            return
        try:
            coming = self._coming = Successor(self._listeners.all(), self._listeners.served)
        except OSError as error:
            self._failed(f"it could not be started: {error}")
            return
        say("upgrading", "process %d is to replace this one", coming.pid, successor_pid=coming.pid)
        self._turns.watch(coming.control, self._hear)
        self._turns.later(self._limit_s, lambda: self._give_up(coming))

    def _hear(self) -> None:
        coming = self._coming
        assert coming is not None
        try:
            if not coming.is_ready():
                return
        except EOFError:
            self._take_back(coming)
            self._silent.add(coming)
            self._bury(coming, _LOOKS)
            return
        self._end(coming)
        self.pid, self.served = coming.pid, coming.served
        say("upgraded", "process %d serves in place of this one", coming.pid, successor_pid=coming.pid)
        self._on_ready()

    def _bury(self, coming: Successor, looks: int) -> None:
        """Say how it has ended. A process closes its files a moment before it can be reaped, and a server its stream
        before all else that its program does at its end."""
        if coming not in self._silent:
            return  # the server ends, and so does this one
        status = coming.reap()
        if not coming.is_gone and looks:
            self._turns.later(_LOOK_S, lambda: self._bury(coming, looks - 1))
            return
        self._silent.discard(coming)
        self._failed("it gave up its part" if status is None else f"it {describe_status(status)}")
        self._dismiss(coming, self._grace_s)  # if it goes on, without ever serving, or finishes what runs

    def _give_up(self, coming: Successor) -> None:
        if self._coming is coming:
            self._take_back(coming)
            self._failed(f"it did not serve after {self._limit_s:g} seconds, and was told to end")
            self._dismiss(coming, self._grace_s)

    def _dismiss(self, coming: Successor, grace_s: float) -> None:
        """Have it end within its grace: as soon as one of its workers was ready, that had requests."""
        kills_at = CLOCK.monotonic() + grace_s + _MARGIN_S
        if grace_s <= 0:
            coming.kill()
            self._leaving.pop(coming, None)
        elif coming in self._leaving:
            self._leaving[coming] = min(kills_at, self._leaving[coming])
        else:
            self._leaving[coming] = kills_at
            coming.terminate()
            self._see_off(coming)

    def _see_off(self, coming: Successor) -> None:
        kills_at = self._leaving.get(coming)
        if kills_at is None:
            return  # it was killed
        if CLOCK.monotonic() >= kills_at:
            coming.kill()
        coming.reap()
        if coming.is_gone:
            del self._leaving[coming]
        else:
            self._turns.later(_LOOK_S, partial(self._see_off, coming))

    def _take_back(self, coming: Successor) -> None:
        """It will not serve, and soon accepts nothing: connections are for our own listeners, not for more or fewer."""
        self._end(coming)
        self._listeners.steer(self._listeners.served)

    def _end(self, coming: Successor) -> None:
        self._turns.unwatch(coming.control)
        coming.close()
        self._coming = None

    def _failed(self, why: str) -> None:
        say(
            "upgrade_failed",
            "no successor, so this process goes on: %s",
            why,
            level=logging.ERROR,
            reason=why,
        )

    @property
    def is_leaving(self) -> bool:
        """True while a successor that will not serve has not ended."""
        return bool(self._leaving)

    def dismiss(self, grace_s: float) -> None:
        """The server ends: so does, within `grace_s`, a successor that does not serve yet, as it could not know."""
        coming = self._coming
        if coming is not None:
            self._end(coming)
            self._silent.add(coming)
        silent, self._silent = self._silent, set()
        for each in {*silent, *self._leaving}:
            self._dismiss(each, grace_s)

    def close(self) -> None:
        """Nobody waits for them any more."""
        self.dismiss(0.0)
