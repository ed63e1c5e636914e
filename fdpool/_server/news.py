"""What a server says of its life: one record of the logger "fdpool.server" for each event.

Each has `event` among its attributes, a word that does not change, and others as they apply: `slot`, `generation`,
`worker_pid`, `successor_pid`, `reason`, `traceback`, `stacks`, `stderr`, `requests`, `lost`, `boot_s`, `addresses`,
`workers`, `exit_code`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .._log import log

if TYPE_CHECKING:
    from .link import End, WorkerLink


def say(
    event: str,
    text: str,
    *args: object,
    level: int = logging.INFO,
    exc_info: BaseException | None = None,
    **fields: object,
) -> None:
    """Say that something has happened."""
    log("fdpool.server", level, text, *args, exc_info=exc_info, extra={"event": event, **fields})


def say_of(
    link: WorkerLink, event: str, text: str, *args: object, level: int = logging.INFO, **fields: object
) -> None:
    """Say that something has happened to a worker; `text` begins after "worker <slot>"."""
    log(
        "fdpool.server",
        level,
        f"worker %d {text}",
        link.slot,
        *args,
        extra={
            "event": event,
            "slot": link.slot,
            "generation": link.generation,
            "worker_pid": link.pid,
            **fields,
        },
    )


def worker_failed(link: WorkerLink, why: str, end: End, traceback: str, repeated: bool) -> None:
    """A worker has not come to serve; `repeated` if the last of its generation has failed with the same traceback."""
    if repeated:
        traceback = ""
    details = traceback or link.stacks()
    say_of(
        link,
        "worker_failed",
        "of generation %d failed to boot: %s%s",
        link.generation,
        why,
        " (as the one before)" if repeated else _below(details),
        level=logging.ERROR,
        reason=why,
        traceback=traceback,
        stderr=end.stderr,
    )


def worker_exited(link: WorkerLink, why: str, end: End, expected: bool) -> None:
    """A worker that has served, or was not to serve any more, is not there any more."""
    seen = link.see()
    stacks = "" if expected else link.stacks()  # what it has left at a fault
    cut_off = f", {seen.in_flight} running request(s) cut off" if expected and seen.in_flight else ""
    say_of(
        link,
        "worker_exited",
        "(process %s) has ended: %s%s%s",
        link.pid,
        why,
        cut_off,
        "" if expected else _below(end.traceback or stacks),
        level=_level_of(link, expected and not cut_off),
        reason=why,
        traceback=end.traceback,
        stacks=stacks,
        stderr=end.stderr,
        requests=seen.finished,
        lost=seen.in_flight,
    )


def _level_of(link: WorkerLink, expected: bool) -> int:
    if not expected:
        return logging.WARNING
    return logging.INFO if link.pid is not None else logging.DEBUG  # one that never was


def worker_slow(link: WorkerLink, why: str) -> None:
    """A worker has not moved on for long, and is left alone."""
    stacks = link.stacks()
    say_of(
        link,
        "worker_slow",
        "(process %s): %s; without a request_timeout it may go on%s",
        link.pid,
        why,
        _below(stacks),
        level=logging.WARNING,
        reason=why,
        stacks=stacks,
    )


def _below(details: str) -> str:
    return f"\n{details}" if details else ""


def worker_killed(link: WorkerLink) -> None:
    """A worker that is stuck is about to be killed."""
    stacks = link.stacks()
    if link.pid is None:
        who, where = (
            "",
            "(its process had not begun: its supervisor still imports what is preloaded, or hangs in it)",
        )
    else:
        who, where = f"(process {link.pid}) ", stacks or "(it could not write down where it is)"
    say_of(
        link,
        "worker_killed",
        "%sis killed: %s\n%s",
        who,
        link.why,
        where,
        level=logging.ERROR,
        reason=link.why,
        stacks=stacks,
    )
