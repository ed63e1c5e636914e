"""A task as the client keeps it: the future that stands for it."""

from __future__ import annotations

import _thread
import logging
import threading
from collections import deque
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from ._broken import WorkerLost
from ._clock import CLOCK
from ._critical import block_in_main, put_back
from ._log import log
from ._options import check_seconds
from ._trees import GRACE_S
from .errors import TaskTerminated

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator

    from ._answers import Answer
    from ._client import Client
    from ._options import TaskOptions
    from .payload import Payload

T = TypeVar("T")

#: States of a future that is still to be settled.
UNDONE = (PENDING, RUNNING)


class _Lazily:
    """An attribute that is made as it is first asked for, which is hardly ever; its object is `observed` from then on.

    Not a `__getattr__` of the object's class: with one, CPython looks up each of its other attributes the slow way.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        if obj is None:
            return self
        obj.observed = True
        return obj.__dict__.setdefault(self._name, self._make())


class _Condition(_thread.RLock, threading.Condition):  # type: ignore[misc]  # final to typeshed, not to CPython
    """A condition that is its own lock, so that `with` enters and leaves it inside C.

    The methods of `threading.Condition` that do so are Python: a Ctrl-C in them, with the lock already or still
    taken, would leave a future whose settling hangs the pump.

    All that those methods need besides the lock is made when it is asked for: a future costs 0.7 microseconds, with
    `Future.__init__` and a Condition of its own 1.7.

    Attributes:
        observed: somebody has waited for it.
    """

    __init__ = object.__init__  # in C, unlike Condition's
    observed = False
    _waiters = _Lazily(deque)


class CutShort(Enum):
    """Why a task's worker is ended for its sake."""

    TIMED_OUT = "timed out"
    TOOK_TOO_MUCH = "took too much memory"
    TERMINATED = "terminated"


class TaskFuture(Future[T]):
    """A `concurrent.futures.Future` whose `cancel` can also fetch back a task already sent; `terminate` ends any.

    `cancel()` returns True, and the task never runs, as long as no worker has begun it; a task that
    has begun is not disturbed. `running()` is true from then on, until it is done. Its own methods are
    thread-safe, as the base's are.

    Can be awaited. If the await is cancelled, the task is terminated: `asyncio.shield` keeps it.
    """

    _result: T
    _exception: BaseException | None
    _state: str
    # A _Condition; typeshed's `as_completed` takes no future with anything else.
    _condition: threading.Condition
    # Lists that are hardly ever used, of 100 bytes each, which the garbage collector has to look through.
    _waiters: list[Any] = _Lazily(list)  # type: ignore[assignment]
    _done_callbacks: list[Any] = _Lazily(list)  # type: ignore[assignment]
    observed = False  # somebody wants to be told of its end
    _client: Client | None = None
    _task = 0
    #: For the pool: the payload, as long as the task may have to be sent (again), and what errors call the task.
    call: Payload | None = None
    label = ""
    options: TaskOptions | None = None
    cut_short: CutShort | None = None
    used_memory = 0  # when that was too much
    grace_s = GRACE_S  # from SIGTERM to SIGKILL, if its worker is to be ended for it
    attempts: tuple[BaseException, ...] = ()  # what became of earlier ones

    def __init__(self) -> None:
        self._condition = _Condition()
        self._state = PENDING
        self._result = None  # type: ignore[assignment]
        self._exception = None

    def __reduce__(self) -> Any:
        raise TypeError("a future cannot leave its process; its result may")

    def cancel(self) -> bool:
        return self.withdraw(running=False)

    def terminate(self, grace: float = GRACE_S) -> bool:
        """End the task, wherever it is; True unless it has ended already.

        Not begun: cancelled. Running: `TaskTerminated` is raised in it; if it has not ended after `grace` seconds
        (it is in C code, say, or catches everything), its worker and all that descends from it get SIGTERM, and
        after as long again SIGKILL. No other task is affected.

        Does not wait; a second call can only make it sooner. The future is cancelled once the task has ended so; but if
        it returns nevertheless, or raises something else, that is the outcome.

        Raises:
            TypeError, ValueError: `grace` is of no use.
        """
        check_seconds("grace", grace, zero=True)
        client = self._client
        if client is None or self.done():
            return super().cancel()
        if self.withdraw(running=False):
            return True
        if self.done():
            return self.cancelled()
        client.terminate(self._task, grace)
        return True

    def __await__(self) -> Generator[Any, None, T]:
        # Not by `asyncio.wrap_future`: up to Python 3.11, that never tells of a task that has raised StopIteration.
        import asyncio

        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self.add_done_callback(partial(_wake_in, loop, waiter))
        try:
            yield from waiter
            if self.cancelled():
                raise asyncio.CancelledError
            return self.result()
        except asyncio.CancelledError:
            self.terminate()
            raise
        finally:
            del self  # or future and traceback would keep each other

    @property
    def may_retry(self) -> bool:
        """For the pool: True if the task is to be tried again should its worker die."""
        return self.options is not None and len(self.attempts) < self.options.retries

    def withdraw(self, running: bool) -> bool:
        """For the pool: `cancel`; with `running`, a program that runs is stopped, too."""
        client = self._client
        if client is None or self.done():
            return super().cancel()
        cancelled = False
        mask = block_in_main()  # once the pool has forgotten the task, nobody else would ever settle this
        try:
            if not (client.withdraw(self._task) or (running and self._stop(client))):
                return self.cancelled()
            with self._condition:
                cancelled = self._state == PENDING
                if cancelled:
                    self._state = CANCELLED
                    self._condition.notify_all()
            if cancelled:
                client.wake_waiter(self)
                # What an executor calls when it meets a cancelled future; `wait` and `as_completed` are only
                # told by this.
                super().set_running_or_notify_cancel()
        finally:
            try:
                put_back(mask)
            finally:
                if cancelled:
                    self._invoke_callbacks()  # user code: signals let through
        return self.cancelled()

    if TYPE_CHECKING:

        def _invoke_callbacks(self) -> None: ...

    def _stop(self, client: Client) -> bool:
        """End a program; True if it runs. It may have ended, for that, before this returns."""
        before, self.cut_short = self.cut_short, self.cut_short or CutShort.TERMINATED
        if client.stop(self._task):
            return True
        self.cut_short = before
        return False

    def result(self, timeout: float | None = None) -> T:
        if self._state == FINISHED and self._exception is None:
            return self._result
        client = self._client
        if client is not None and self._state in UNDONE:
            if timeout is None:
                client.wait_for(self, None)
                if self._state == FINISHED and self._exception is None:
                    return self._result
            else:
                timeout = _wait(client, self, timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # or future and traceback would keep each other

    def exception(self, timeout: float | None = None) -> BaseException | None:
        client = self._client
        if client is not None and self._state in UNDONE:
            timeout = _wait(client, self, timeout)
        return super().exception(timeout)

    def set_result(self, result: T) -> None:
        super().set_result(result)
        self._tell_waiter()

    def set_exception(self, exception: BaseException | None) -> None:
        super().set_exception(exception)
        self._tell_waiter()

    def _tell_waiter(self) -> None:
        client = self._client
        if client is not None:
            client.wake_waiter(self)

    def settle(self, result: Any, error: BaseException | None) -> bool:
        """For the pool: what `set_result` and `set_exception` do, save calling back; True if there is a need to.

        Nothing happens to a future that its owner has settled by hand.
        """
        with self._condition:
            self._client = None
            if self._state not in UNDONE:
                return False
            self._result = result
            self._exception = error
            self._state = FINISHED
            if (
                error is not None
                and self.cut_short is CutShort.TERMINATED
                and isinstance(error, (TaskTerminated, WorkerLost))
            ):
                self._exception = None
                self._state = CANCELLED_AND_NOTIFIED
            if self._condition.observed:  # type: ignore[attr-defined]
                self._condition.notify_all()
            if not self.observed:
                return False
            for waiter in self._waiters:
                if self._state != FINISHED:
                    waiter.add_cancelled(self)
                elif error is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            return bool(self._done_callbacks)

    def call_back(self) -> None:
        """For the pool: call what was added before `settle`. Never raises."""
        try:
            self._invoke_callbacks()
        except BaseException:
            # concurrent.futures logs what a callback raises, but SystemExit and its like it lets through, and the
            # pool would stand still.
            log(
                "concurrent.futures",
                logging.ERROR,
                "exception calling callback for %r",
                self,
                exc_info=True,
            )

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


def _wake_in(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None], _: Future[Any]) -> None:
    """Wake the coroutine that waits for `waiter`; from any thread."""
    try:
        loop.call_soon_threadsafe(_wake, waiter)
    except RuntimeError:
        pass  # the loop is closed


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # it may be cancelled
        waiter.set_result(None)


def _wait(client: Client, future: TaskFuture[Any], timeout: float | None) -> float | None:
    """Wait as far as the client can help; returns what is left of `timeout`."""
    if timeout is None:
        client.wait_for(future, None)
        return None
    deadline = CLOCK.monotonic() + timeout
    client.wait_for(future, timeout)
    return max(0.0, deadline - CLOCK.monotonic())


class ChunkFuture(TaskFuture[None]):
    """Some items of a map, which travel together; inside the pool only.

    Attributes:
        start, stop: which of the items in the payload.
        pieces: messages with results, in order, as they came.
        results: once it is settled: of the items up to `stop`, or as far as they got.
        mixed: some of them are `_chunks.Raised`.
        abandoned: nobody reads the results any more; what is parted from it is not to be run.
        after: the chunk of the items from `stop` on that this one once had, or None.
    """

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop
        self.pieces: list[Answer] = []
        self.results: list[Any] = []
        self.mixed = False
        self.abandoned = False
        self.after: ChunkFuture | None = None

    def part(self, reached: int, count: int) -> list[ChunkFuture]:
        """Keep the items up to `reached`, and make `count` chunks of the rest, or one if it is a single item.

        Each has a copy of the call, or none if there is no descriptor left for it.
        """
        call = self.call
        if call is None:
            return []  # it is settled
        total = self.stop - reached
        count = min(count, total)
        edges = [reached + total * n // count for n in range(count + 1)] if total else []
        chunks = [ChunkFuture(start, stop) for start, stop in pairwise(edges)]
        self.stop = reached
        for chunk in chunks:
            try:
                chunk.call = call.copy()
            except OSError:
                pass
        for chunk in reversed(chunks):
            chunk.abandoned = self.abandoned
            chunk.after = self.after
            self.after = chunk
        return chunks


class CommandFuture(TaskFuture[T]):
    """The future of a program: `cancel()` also ends one that runs, with all that descends from it.

    It returns True then, and the future is cancelled at once; the program has its grace, and the pool
    waits for its end.
    """

    def cancel(self) -> bool:
        return self.withdraw(running=True)

    def terminate(self, grace: float = GRACE_S) -> bool:
        """As `cancel`: the program has the grace that it was started with."""
        return self.cancel()
