"""What a worker's answer, or its death, means to the future of a task."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from . import _messages, payload
from ._broken import PoisonTask, WorkerLost, describe_status
from ._links import Exit
from ._messages import Header
from ._options import TaskOptions
from ._tasks import CutShort, TaskFuture
from .errors import FdpoolError, FdTransferError, MemoryLimitExceeded, TaskTimeout
from .fds import close_all

#: The header, the body, and the descriptors of a DONE, FAILED or REFUSED message; these are owned.
Answer = tuple[Header, bytes, list[int]]

_RESULTS = frozenset((_messages.DONE, _messages.PIECE, _messages.CUT))


def open_answer(header: Header, body: bytes, numbers: list[int]) -> tuple[Any, BaseException | None]:
    """The result, or the error, that a DONE, FAILED or REFUSED datagram settles its future with.

    Takes its descriptors over. Never raises: user code runs in here, and what that raises is the error.
    """
    kind = header.kind
    if kind in _RESULTS and not numbers and not header.fd_count:
        try:
            return payload.loads(body, numbers, False), None
        except BaseException as error:
            return None, _marked(error)
    if kind == _messages.REFUSED:
        close_all(numbers)
        wanted, got, reason = _messages.split_refusal(body)
        return None, FdTransferError(reason, wanted, got)
    if len(numbers) != header.fd_count:
        close_all(numbers)
        lost = lost_descriptors(header.fd_count, len(numbers), "this process")
        lost.may_have_run = True
        return None, lost
    if kind == _messages.FAILED:
        return None, payload.loads_failure(body, numbers, header.spilled)
    try:
        return payload.loads(body, numbers, header.spilled), None
    except BaseException as error:
        return None, _marked(error)


def _marked(error: BaseException) -> BaseException:
    if isinstance(error, FdpoolError):
        error.may_have_run = True
    return error


def lost_descriptors(wanted: int, got: int, receiver: str) -> FdTransferError:
    """The error for descriptors that did not arrive with their message."""
    return FdTransferError(_messages.explain_loss(wanted, got, receiver), wanted, got)


def task_lost(record: TaskFuture[Any], slot: int, death: Exit, begun: bool) -> BaseException:
    """The error of the task that a worker had received, and most likely begun, when it died."""
    options = record.options or TaskOptions()
    if record.cut_short is CutShort.TIMED_OUT and options.timeout is not None:
        late = TaskTimeout(
            f"{record.label} had run for {options.timeout:g} seconds, which is its timeout; its worker {death.pid} "
            f"(slot {slot}) was ended, with all that descended from it{_again(record)}{_remains(death)}",
            options.timeout,
            death.stacks,
            death.said,
        )
        late.attempts = (*record.attempts,)
        return late
    if record.cut_short is CutShort.TOOK_TOO_MUCH and options.max_memory is not None:
        fat = MemoryLimitExceeded(
            f"{record.label} took {record.used_memory:,} bytes of memory, its max_memory is {options.max_memory:,}; "
            f"its worker {death.pid} (slot {slot}) was ended, with all that descended from it{_again(record)}"
            f"{_remains(death)}",
            options.max_memory,
            record.used_memory,
            death.stacks,
            death.said,
        )
        fat.attempts = (*record.attempts,)
        return fat
    return _worker_lost(record, slot, death, begun)


def _worker_lost(record: TaskFuture[Any], slot: int, death: Exit, begun: bool) -> WorkerLost:
    status = death.status
    hint = f" ({death.hint})" if death.hint else ""
    what = (
        f"while it ran {record.label}: the task may have run in part"
        if begun
        else f"just before it began {record.label}: the task has not run, but its descriptors are gone"
    )
    # One that died before its start was reported has no pid that is known here.
    who = f"worker {death.pid} (slot {slot})" if death.pid else f"the worker of slot {slot}"
    lost = PoisonTask if record.attempts and begun and not record.may_retry else WorkerLost
    error = lost(
        f"{who} {describe_status(status)}{hint} {what}{_again(record)}; no other task is affected{_remains(death)}",
        pid=death.pid,
        slot=slot,
        signal=os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None,
        exit_code=os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None,
        stacks=death.stacks,
        stderr=death.said,
    )
    error.may_have_run = begun
    if isinstance(error, PoisonTask):
        error.attempts = (*record.attempts,)
    return error


def _again(record: TaskFuture[Any]) -> str:
    count = len(record.attempts)
    return f", in the last of {count + 1} attempts" if count else ""


def _remains(death: Exit) -> str:
    """What the worker left that may say why, each part indented below a line of its own."""
    text = ""
    for title, part in (
        ("Its stacks then", death.stacks),
        ("The end of what it wrote to stderr", death.said),
    ):
        if part.strip():
            text += f"\n{title}:\n{textwrap.indent(part.rstrip(), '  ')}"
    return text
