"""Where in its life a pool is, and how it comes to the next phase: its beginning, its end, and what may break it.

A pool that is shut down finishes its tasks, dismisses its workers, and then its supervisor. One that is broken, or
ended, fails its tasks, and has its workers ended rather than dismissed. Whichever it is, the pump enters each phase
when the one before has nothing left to do, or has taken its time (`move_on`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

from . import _messages, _process, _trees
from ._board import Board
from ._broken import PoolBroken, describe_status
from ._clock import CLOCK
from ._critical import mask_now
from ._dispatch import Action
from ._links import Exit
from ._log import log
from ._pump import Pump
from ._signals import Mask
from .errors import ForkedPool, PoolShutDown
from .payload import said

if TYPE_CHECKING:
    from ._client import Client
    from ._supervision import Supervision

_LEAVE_S = 5.0  # how long a dismissed worker may take for its exit handlers and threads
_IMPORTING = (
    "FDPOOL_IMPORTING"  # in the environment of workers of a pool that a module uses as it is imported
)
_QUIT_S = 10.0  # how long the supervisor may take to clear up


class Phase(Enum):
    """Where in its life a pool is; it only ever moves down this list."""

    NEW = "new"  # nothing started yet
    SERVING = "serving"
    DRAINING = "draining"  # shut down: finishes what was submitted
    LEAVING = "leaving"  # no task is left; the workers go
    QUITTING = "quitting"  # no worker is left; the supervisor goes
    OVER = "over"
    FORKED = "forked"  # this is a copy, in a forked child of the pool's process


NEW, SERVING, DRAINING, LEAVING, QUITTING, OVER, FORKED = Phase  # quicker to look up, as in `_slots`


class Lifetime:
    """Of `client`. Ends with the process at the latest (`_process.Owner`).

    Attributes:
        client: whose life it is.
        phase: written with the lock held, or in a forked child.
        dropping: what has not begun is cancelled.
        last_death: what became of the worker that died last, in words.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.phase = NEW
        self._ends_at = 0.0  # when LEAVING or QUITTING has taken its time
        self.dropping = False
        self.last_death = ""
        self._broken: tuple[str, BaseException | None] | None = None  # why, and what of
        self._torn_by: BaseException | None = None
        # SIGTERM to SIGKILL, once the workers are to be ended, not dismissed.
        self._grace_s: float | None = None

    @property
    def is_over(self) -> bool:
        """True once nothing of the pool is left."""
        return self.phase is OVER

    @property
    def is_broken(self) -> bool:
        """True once it is of no use any more."""
        return self._broken is not None

    @property
    def runs_tasks(self) -> bool:
        """True as long as what was submitted is run."""
        return self.phase in (SERVING, DRAINING)

    @property
    def supervision(self) -> Supervision:
        """Of this pool, for others of the process that could do with a fork of its supervisor."""
        return self.client.supervision

    def check_usable(self) -> None:
        """Raise what `submit` does of a pool that takes no tasks."""
        if self.phase is SERVING and self._broken is None and not _process.exiting():
            return
        if self.phase is FORKED:
            raise ForkedPool(
                "this pool belongs to the process that made it, and this is a forked child of that: "
                "make a new Pool here"
            )
        if self._broken is not None:
            raise self.broken_error()
        if _process.exiting():
            raise PoolShutDown("cannot schedule new futures after interpreter shutdown")
        if self.phase not in (NEW, SERVING):
            raise PoolShutDown("cannot schedule new futures after shutdown")

    # -- the beginning ---------------------------------------------------------------------------------------

    def begin(self, mask: Mask | None) -> None:
        """Start what a first task needs: the supervisor, then the pump (a fork comes before any thread of ours).

        `mask` is what signals this thread blocked before; None if they are blocked still.
        """
        self.check_usable()
        client = self.client
        with client.critical:
            if self.phase is not NEW:
                unusable = self.phase is not SERVING
            else:
                unusable = False
                try:
                    client.pump = Pump(client, mask_now() if mask is None else mask)
                    client.board = Board(client.max_workers)
                    with _marked_where_imported():
                        client.supervision.start()
                    client.pump.start()
                    self.phase = SERVING
                    client.perform(client.dispatcher.staffed())
                # User code runs in there, too: streams are flushed, a path is made a string.
                except Exception as error:
                    self._broken = (f"the pool's supervisor could not be started: {said(error)}", error)
                    client.supervision.bury(0.0)
                    self._release()
                    client.pump = None  # a thread that has not started cannot be joined
                    unusable = True
        if unusable:
            self.check_usable()

    # -- its user wants an end -------------------------------------------------------------------------------

    def let_go(self) -> None:
        """The pool was dropped: finish what was submitted, and end. Never waits, as this is for a finalizer:
        that may run anywhere, in the middle of this very client's decisions too."""
        if self.phase is not FORKED:
            self.client.critical.post(self._close_doors)

    def _close_doors(self) -> Sequence[Action]:
        """Event: no more tasks are taken."""
        if self.phase is NEW:
            self._release()
        elif self.phase is SERVING:
            self.phase = DRAINING
        self.client.wake()
        return ()

    def shut_down(self, cancel: bool = False) -> None:
        """Take no more tasks; finish (or, with `cancel`, drop) what has not begun. Does not wait."""
        if self.phase is FORKED:
            return
        with self.client.critical:
            self._close_doors()
            self.dropping = self.dropping or cancel
        if cancel:
            # Newest first: what is queued goes before what lies in an inbox, or each place made there would
            # be filled again from the queue.
            for record in reversed(list(self.client.tasks.values())):
                record.withdraw(running=False)  # what runs shall finish, a program too
        self.client.wake()

    def end(self, grace_s: float, reason: str) -> None:
        """End every worker and what descends from it: SIGTERM, `grace_s` seconds, SIGKILL. Does not wait."""
        self.shut_down(cancel=True)
        self.client.critical.post(self.break_pool, reason, None, grace_s)

    @property
    def may_wait(self) -> bool:
        """True unless this thread is the pump, which runs callbacks: nothing would go on."""
        pump = self.client.pump
        return pump is None or not pump.is_current

    def join(self) -> None:
        """Wait until nothing of the pool is left; from a callback in the pump's own thread it returns at once."""
        pump = self.client.pump
        if pump is not None and self.phase is not FORKED:
            pump.receiver.stand_aside()
            pump.join()

    def forget_in_child(self) -> None:
        """Runs in: a forked child of the client, just after the fork. Close the copies, say nothing to anyone."""
        self.phase = FORKED
        self.client.close(abandoned=True)

    # -- it breaks -------------------------------------------------------------------------------------------

    def break_pool(
        self, reason: str, cause: BaseException | None = None, grace_s: float = 0.0
    ) -> Sequence[Action]:
        """Event: the pool is of no use any more. Fail every task, have the workers ended."""
        if self.phase in (QUITTING, OVER, FORKED):
            return ()
        self._broken = self._broken or (reason, cause)
        self._grace_s = grace_s
        # First: who submits enters its task, and looks at the phase second.
        phase, self.phase = self.phase, LEAVING
        if phase is not LEAVING:
            self.client.dispatcher.closed()
            for task in list(self.client.tasks):
                self.client.fail(task, self.broken_error())
        self._enter_leaving()
        self.client.wake()
        return ()

    def torn(self, error: BaseException) -> None:
        """Something was raised in the middle of a decision: what the dispatcher believes may be wrong now.

        The pump breaks the pool, as no signal handler runs there: this may be interrupted, too.
        """
        self._torn_by = error
        self.client.wake()

    def mend(self) -> None:
        """Runs in: the pump. Break the pool if a decision was torn."""
        error = self._torn_by
        if error is not None:
            self._torn_by = None
            reason = f"interrupted in the middle of a decision by {type(error).__name__}: {error}"
            with self.client.critical:
                self.break_pool(reason, error)

    def broken_error(self) -> PoolBroken:
        """What a task of a pool that is broken fails with. A new instance each time: futures that share one would pile
        their tracebacks onto it."""
        assert self._broken is not None
        reason, cause = self._broken
        error = PoolBroken(reason)
        error.__cause__ = cause
        return error

    def supervisor_gone(self) -> bool:
        """Runs in: the pump. The control link has ended: as it should, or the workers are killed from here.

        Returns True if the pool goes on, with a new supervisor. Tasks that ran are lost; all others are not touched.
        """
        client = self.client
        news = ""
        with client.critical:
            if self.phase is not QUITTING:
                pid = 0 if client.control is None else client.control.pid
                self._kill_all()
                status = client.supervision.bury(_QUIT_S)
                given_up = client.supervision.given_up
                what = f"was killed by the pool, as {given_up}" if given_up else describe_status(status)
                how = f"the pool's supervisor {what}"
                if self._start_again(f"because {how}"):
                    news = f"{how} (it was process {pid}); its workers have been killed, and a new one was started"
                else:
                    self.break_pool(f"{how}; its workers have been killed")
        if news:
            log("fdpool", logging.WARNING, news)
            return True
        assert client.pump is not None
        client.pump.settle()
        with client.critical:
            self.bury()
        return False

    def _start_again(self, hint: str) -> bool:
        """Replace the supervisor, and settle what its workers were running. Lock held."""
        client = self.client
        if not client.supervision.replace(wanted=self.runs_tasks):
            return False
        assert client.pump is not None
        client.pump.watch_control()
        for link in [link for link in client.links.values() if link.lost or link.starting]:
            client.pump.worker_gone(link.slot, Exit(link.last_exit.pid, signal.SIGKILL, hint=hint))
        return True

    # -- the end ---------------------------------------------------------------------------------------------

    @property
    def overdue_at(self) -> float | None:
        """When the phase that the end is in has taken its time."""
        return self._ends_at if self.phase in (LEAVING, QUITTING) else None

    def move_on(self) -> None:
        """Runs in: the pump. Enter the next phase of the end if this one is done or has taken its time."""
        if self.phase is SERVING:
            return
        client = self.client
        with client.critical:
            overdue = CLOCK.monotonic() >= self._ends_at
            if self.phase is DRAINING and not client.tasks:
                self._enter_leaving()
                overdue = False
            if self.phase is LEAVING and not any(link.alive for link in client.links.values()):
                self.phase, self._ends_at = QUITTING, CLOCK.monotonic() + _QUIT_S
                client.tell(_messages.Quit())
            elif self.phase is LEAVING and overdue:
                if self._grace_s == 0.0:  # the supervisor does not do as it was told (it is stopped, say)
                    self._kill_all()
                    self.bury(0.0)
                else:
                    self._grace_s = 0.0
                    self._enter_leaving()
            elif self.phase is QUITTING and overdue:
                self.bury(0.0)

    def _enter_leaving(self) -> None:
        """Dismiss the workers, or end them if the pool is broken; they have their time. Lock held."""
        client = self.client
        self.phase = LEAVING
        if self._grace_s is None:
            self._ends_at = CLOCK.monotonic() + _LEAVE_S
            client.perform(client.dispatcher.dismissed())
            return
        self._ends_at = CLOCK.monotonic() + self._grace_s + _LEAVE_S
        for slot, link in client.links.items():
            if link.alive:
                client.end_worker(slot, self._grace_s)

    def _kill_all(self) -> None:
        """SIGKILL every worker and its tree, without the supervisor. Lock held."""
        for link in self.client.links.values():
            link.kill()

    def bury(self, limit_s: float = _QUIT_S) -> None:
        """Wait for the supervisor, which is going or is killed after `limit_s`, and close everything. Lock held."""
        self.client.supervision.bury(limit_s)
        self._release()

    def _release(self) -> None:
        """The pool is over: close what the client owns; the pump does so itself, with the lock free. Lock held."""
        self.phase = OVER
        _process.unregister(self)
        if self.may_wait:
            self.client.close()


@contextmanager
def _marked_where_imported() -> Iterator[None]:
    """Around the start of a supervisor. Raise where a module uses a pool as a worker imports it for its task, if this
    worker's own pool was used by one, too: each of that pool's workers would import it again, and so on without end.

    Programs and tasks may import and use what they like; and so may a module, in the workers of a pool as in
    their client.
    """
    where = _imported_at() if _trees.WORKER_MARK in os.environ else None
    if where is None:
        yield
        return
    if _IMPORTING in os.environ:
        raise RuntimeError(
            f"{where} uses a pool, as the module is imported in a worker of another pool, which was used by a module as"
            " that was imported: that may go on without end. Use the pool in a function, or under"
            " `if __name__ == '__main__':`"
        )
    os.environ[_IMPORTING] = "1"
    try:
        yield
    finally:
        os.environ.pop(_IMPORTING, None)


def _imported_at() -> str | None:
    """The line of a module that this worker runs, as it imports it to load its task; None if it does not."""
    where = None
    is_loading = False
    frame = sys._getframe()
    while (module := frame.f_globals.get("__name__")) != "fdpool._worker":
        if frame.f_code.co_name == "<module>" and where is None:
            where = f"line {frame.f_lineno} of module {module!r}"
        is_loading = is_loading or (module == "fdpool.payload" and where is not None)
        if frame.f_back is None:
            return None  # a thread, or a program, that a worker has started
        frame = frame.f_back
    return where if is_loading else None
