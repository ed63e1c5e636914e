"""A task as the client keeps it, and the future that stands for it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ._client import Client
    from .payload import Payload

T = TypeVar("T")


class TaskFuture(Future[T]):
    """A `concurrent.futures.Future` whose `cancel` can also fetch back a task already sent.

    `cancel()` returns True, and the task never runs, as long as no worker has received it; a task that
    has begun is not disturbed. `running()` is true for the oldest unanswered task of a worker. Its own
    methods are thread-safe, as the base's are.
    """

    _client: Client | None = None
    _task = 0

    def cancel(self) -> bool:
        client = self._client
        if client is None or self.done():
            return super().cancel()
        if not client.withdraw(self._task):
            return self.cancelled()
        super().cancel()
        # What an executor calls when it meets a cancelled future; `wait` and `as_completed` are only
        # told by this.
        super().set_running_or_notify_cancel()
        return True

    def running(self) -> bool:
        client = self._client
        return super().running() or (client is not None and not self.done() and client.has_begun(self._task))


class Task:
    """What the client holds of a task until it is settled; the payload only until it is sent."""

    __slots__ = ("future", "label", "payload")

    def __init__(self, future: TaskFuture[Any], payload: Payload | None, label: str) -> None:
        self.future = future
        self.payload = payload
        self.label = label
