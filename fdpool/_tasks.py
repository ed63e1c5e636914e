"""A task as the client keeps it, and the future that stands for it."""

from __future__ import annotations

import _thread
import threading
from collections import deque
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, PENDING
from typing import TYPE_CHECKING, Any, TypeVar

from ._critical import block_in_main, put_back

if TYPE_CHECKING:
    from ._client import Client
    from .payload import Payload

T = TypeVar("T")


class _Condition(_thread.RLock, threading.Condition):  # type: ignore[misc]  # final to typeshed, not to CPython
    """A condition that is its own lock, so that `with` enters and leaves it inside C.

    The methods of `threading.Condition` that do so are Python: a Ctrl-C in them, with the lock already or still
    taken, would leave a future whose settling hangs the pump.
    """

    def __init__(self) -> None:
        self._waiters: deque[Any] = deque()  # all that Condition's own methods need besides the lock


class TaskFuture(Future[T]):
    """A `concurrent.futures.Future` whose `cancel` can also fetch back a task already sent.

    `cancel()` returns True, and the task never runs, as long as no worker has received it; a task that
    has begun is not disturbed. `running()` is true for the oldest unanswered task of a worker. Its own
    methods are thread-safe, as the base's are.
    """

    _result: T
    _exception: BaseException | None
    _client: Client | None = None
    _task = 0

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()

    def cancel(self) -> bool:
        client = self._client
        if client is None or self.done():
            return super().cancel()
        cancelled = False
        mask = block_in_main()  # once the pool has forgotten the task, nobody else would ever settle this
        try:
            if not client.withdraw(self._task):
                return self.cancelled()
            with self._condition:
                cancelled = self._state == PENDING
                if cancelled:
                    self._state = CANCELLED
                    self._condition.notify_all()
            if cancelled:
                # What an executor calls when it meets a cancelled future; `wait` and `as_completed` are only
                # told by this.
                super().set_running_or_notify_cancel()
        finally:
            try:
                put_back(mask)
            finally:
                if cancelled:
                    self._invoke_callbacks()  # type: ignore[attr-defined]  # user code: signals let through
        return self.cancelled()

    def _Future__get_result(self) -> T:
        """What the base's `result()` ends with, save that an exception may be falsy (gh-132063, Python 3.14)."""
        if self._exception is None:
            return self._result
        try:
            raise self._exception
        finally:
            del self  # or future and traceback would keep each other

    def running(self) -> bool:
        client = self._client
        return super().running() or (client is not None and not self.done() and client.has_begun(self._task))


class CommandFuture(TaskFuture[T]):
    """The future of a program: `cancel()` also ends one that runs, with all that descends from it.

    It returns True then, and the future is cancelled at once; the program has its grace, and the pool
    waits for its end.
    """

    def cancel(self) -> bool:
        if super().cancel():
            return True
        client = self._client
        if client is None or self.done() or not client.stop(self._task):
            return self.cancelled()
        if not Future.cancel(self):
            return False  # it has ended meanwhile
        self.set_running_or_notify_cancel()
        return True


class Task:
    """What the client holds of a task until it is settled; the payload only until it is sent."""

    __slots__ = ("future", "label", "payload")

    def __init__(self, future: TaskFuture[Any], payload: Payload | None, label: str) -> None:
        self.future = future
        self.payload = payload
        self.label = label
