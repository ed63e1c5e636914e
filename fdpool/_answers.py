"""What a worker's answer, or its death, means to the future of a task."""

from __future__ import annotations

import os
from typing import Any

from . import _messages, payload
from ._broken import WorkerLost, describe_status
from ._messages import Header
from .errors import FdpoolError, FdTransferError
from .fds import close_all

#: The header, the body, and the descriptors of a DONE, FAILED or REFUSED message; these are owned.
Answer = tuple[Header, bytes, list[int]]


def open_answer(header: Header, body: bytes, numbers: list[int]) -> tuple[Any, BaseException | None]:
    """The result, or the error, that a DONE, FAILED or REFUSED datagram settles its future with.

    Takes its descriptors over. Never raises: user code runs in here, and what that raises is the error.
    """
    if (
        header.kind != _messages.FAILED
        and header.kind != _messages.REFUSED
        and not numbers
        and not header.fd_count
    ):
        try:
            return payload.loads(body, numbers, False), None
        except BaseException as error:
            return None, _marked(error)
    if header.kind == _messages.REFUSED:
        close_all(numbers)
        wanted, got = _messages.REFUSAL.unpack_from(body)
        return None, FdTransferError(body[_messages.REFUSAL.size :].decode(), wanted, got)
    if len(numbers) != header.fd_count:
        close_all(numbers)
        lost = lost_descriptors(header.fd_count, len(numbers), "this process")
        lost.may_have_run = True
        return None, lost
    if header.kind == _messages.FAILED:
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


def worker_lost(pid: int, slot: int, status: int | None, label: str, begun: bool) -> WorkerLost:
    """The error of the task that a worker had received, and most likely begun, when it died."""
    what = (
        f"while it ran {label}: the task may have run in part"
        if begun
        else f"just before it began {label}: the task has not run, but its descriptors are gone"
    )
    error = WorkerLost(
        f"worker {pid} (slot {slot}) {describe_status(status)} {what}; no other task is affected",
        pid=pid,
        slot=slot,
        signal=os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None,
        exit_code=os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None,
    )
    error.may_have_run = begun
    return error
