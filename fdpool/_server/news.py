"""What a server says of its life: one record of the logger "fdpool.server" for each event.

Each has `event` among its attributes, a word that does not change, and others as they apply: `slot`, `generation`,
`worker_pid`, `successor_pid`, `reason`, `traceback`, `stacks`, `requests`, `lost`, `boot_s`, `addresses`, `workers`,
`exit_code`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .link import WorkerLink

LOG = logging.getLogger("fdpool.server")


def say(event: str, text: str, *args: object, level: int = logging.INFO, **fields: object) -> None:
    """Say that something has happened."""
    LOG.log(level, text, *args, extra={"event": event, **fields})


def say_of(
    link: WorkerLink, event: str, text: str, *args: object, level: int = logging.INFO, **fields: object
) -> None:
    """Say that something has happened to a worker; `text` begins after "worker <slot>"."""
    LOG.log(
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


def worker_ended(link: WorkerLink, why: str, expected: bool, repeated: bool) -> None:
    """A worker is not there any more; `repeated` if the last one has failed with the same traceback."""
    if link.ready_at is None and not expected:
        text = f"\n{link.traceback}" if link.traceback else ""
        text = " (as the one before)" if repeated else text
        say_of(
            link,
            "worker_failed",
            "of generation %d failed to boot: %s%s",
            link.generation,
            why,
            text,
            level=logging.ERROR,
            reason=why,
            traceback=link.traceback,
        )
        return
    seen = link.see()
    say_of(
        link,
        "worker_exited",
        "(process %s) has ended: %s",
        link.pid,
        why,
        level=logging.INFO if expected else logging.WARNING,
        reason=why,
        requests=seen.finished,
        lost=seen.in_flight,
    )


def worker_killed(link: WorkerLink) -> None:
    """A worker that is stuck is about to be killed."""
    stacks = link.stacks()
    say_of(
        link,
        "worker_killed",
        "(process %s) is killed: %s\n%s",
        link.pid,
        link.why,
        stacks or "(it could not write down where it is)",
        level=logging.ERROR,
        reason=link.why,
        stacks=stacks,
    )
