"""The exceptions of fdpool: one base, two families, and each says whether the task may have run.

Errors of the first family are *yours*: something handed in cannot be used. Those of the second
come from *the other side*: a worker, its results, or the kernel between. The two that are also
`BrokenProcessPool` live in `_broken`, because that base costs 28 ms to import (measured) and neither the
supervisor nor a worker ever raises them.
"""

from __future__ import annotations

import pickle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class FdpoolError(Exception):
    """Base of every error that fdpool raises on its own account.

    Attributes:
        may_have_run: True if the task may have begun before the error, False if it certainly
            had not, None where the error is not about a task.
    """

    may_have_run: bool | None = None


# -- yours ---------------------------------------------------------------------------------------


class DescriptorRefused(FdpoolError, ValueError):
    """A file, socket or number that cannot be handed to another process; raised at submit.

    The message names the object and the reason. Nothing was queued and nothing is left open.
    """

    may_have_run = False


class NotPicklable(FdpoolError, pickle.PicklingError):
    """A task's argument, or its result, that cannot be pickled; the message names the object.

    For an argument `may_have_run` is False; for a result it is True: the task ran to its end.
    """


class PayloadTooLarge(FdpoolError, ValueError):
    """More bytes or descriptors than one message can carry; raised before anything is sent."""

    may_have_run = False


class DescriptorsExhausted(FdpoolError, OSError):
    """No descriptor is left in this process for what a task carries (RLIMIT_NOFILE), and none becomes free.

    From `submit`; nothing was queued. `errno` is EMFILE.
    """

    may_have_run = False


class ForkedPool(FdpoolError, RuntimeError):
    """A pool, or a server, used in a forked child of the process that made it; make a new one there."""

    may_have_run = False


class PoolShutDown(FdpoolError, RuntimeError):
    """A task submitted after `shutdown` or after the interpreter began to exit."""

    may_have_run = False


class BindFailed(FdpoolError, OSError):
    """A server cannot listen where it was told to; the message says where, why, and what to do.

    Attributes:
        errno: the kernel's reason, or None if the kernel was not asked.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            type(self),
            (*self.args, self.errno),
            self.__dict__,
        )  # OSError's own knows of no errno without a text


class ServerFailed(FdpoolError, RuntimeError):
    """A server that cannot serve: no worker can be booted, or what it needs is not there. The message says why."""


class ReloadFailed(FdpoolError, RuntimeError):
    """New code that does not boot, an `on_reload` that raised, or a server that ends; what served before goes on."""


# -- the other side ------------------------------------------------------------------------------


class NotLoadable(FdpoolError, pickle.UnpicklingError):
    """A task or a result that was pickled but could not be loaded again at the other end.

    The message names the original error. For a task `may_have_run` is False, for a result True.
    """


class RemoteError(FdpoolError):
    """Stands in for a worker's exception that could not be carried over or rebuilt here.

    Attributes:
        type_name: the qualified name of the original exception's class.
        message: what `str()` of the original gave.
        traceback: the worker's formatted traceback, as text.
    """

    may_have_run = True

    def __init__(self, message: str, type_name: str = "", traceback: str = "") -> None:
        super().__init__(message, type_name, traceback)
        self.message = message
        self.type_name = type_name
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.type_name else self.message


class RemoteTraceback(Exception):
    """The worker's traceback as text; the `__cause__` of every exception that a task raised.

    Attributes:
        tb: the formatted traceback.
    """

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return self.tb


class FdTransferError(FdpoolError, OSError):
    """Descriptors that the kernel did not deliver, though the message's bytes arrived.

    Attributes:
        wanted: how many descriptors the message was sent with.
        got: how many arrived (they have been closed).
        data: from a stream, the bytes of the frame that they belonged to; else empty.
    """

    may_have_run = False

    def __init__(self, message: str, wanted: int = 0, got: int = 0) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.got = got
        self.data = b""


class TaskTimeout(FdpoolError, TimeoutError):
    """A task that took longer than it was allowed to; its worker was ended, and all that descended from it.

    Attributes:
        timeout: the limit, in seconds.
        stacks: the worker's Python stacks just before, as text; empty if it could not be asked, or had not begun.
        stderr: the end of what it wrote to stderr.
        attempts: what became of earlier attempts, oldest first, where it was tried again.

    `may_have_run` is False if it had not begun in time (`queue_timeout`).
    """

    may_have_run = True

    def __init__(self, message: str, timeout: float = 0.0, stacks: str = "", stderr: str = "") -> None:
        super().__init__(message)
        self.timeout = timeout
        self.stacks = stacks
        self.stderr = stderr
        self.attempts: tuple[BaseException, ...] = ()


class MemoryLimitExceeded(FdpoolError, MemoryError):
    """A task whose worker, with all that descends from it, took more memory than `max_memory`; it was ended.

    Attributes:
        limit, used: bytes of resident memory.
        stacks, stderr, attempts: as of `TaskTimeout`.
    """

    may_have_run = True

    def __init__(
        self, message: str, limit: int = 0, used: int = 0, stacks: str = "", stderr: str = ""
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used
        self.stacks = stacks
        self.stderr = stderr
        self.attempts: tuple[BaseException, ...] = ()


class TaskTerminated(BaseException):
    """Raised inside a task by `terminate()` of its future. Not an `Exception`: only who means it catches it."""


class WireError(FdpoolError, ValueError):
    """Bytes from a peer that are not a message: wrong version, impossible length, torn header."""
