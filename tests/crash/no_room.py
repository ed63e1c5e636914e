"""To be preloaded: the supervisor has no descriptor left as it looks after its workers.

`VARIABLE` in the environment says how: "but one", which it keeps back; "none" in the first moments in which it looks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Iterator
from typing import Any

from fdpool._reserve import Reserve
from fdpool._supervisor import Supervisor

VARIABLE = "FDPOOL_TEST_NO_ROOM"


@contextlib.contextmanager
def all_taken() -> Iterator[None]:
    """No number below the limit of open files is free: what is closed makes room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with contextlib.suppress(OSError):  # or they are all taken by who called this
        taken.append(os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 + max(map(int, os.listdir("/proc/self/fd"))), hard))
        while True:
            taken.append(os.dup(0))
    try:
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def without_room(kind: type, name: str, moments: int | None = None) -> None:
    act = getattr(kind, name)
    count = itertools.count()

    def act_without_room(*arguments: Any) -> Any:
        with contextlib.nullcontext() if moments is not None and next(count) >= moments else all_taken():
            return act(*arguments)

    setattr(kind, name, act_without_room)


def begin() -> None:
    if os.environ[VARIABLE] == "none":
        Reserve.fill = lambda _: False  # type: ignore[method-assign]
        for name in ("_reap", "_end_worker", "_move_endings_on"):
            without_room(Supervisor, name)
        without_room(Supervisor, "_sweep", 8)
        return
    lent = Reserve.lent

    @contextlib.contextmanager
    def lent_without_room(reserve: Reserve) -> Iterator[None]:
        with all_taken(), lent(reserve):
            yield

    Reserve.lent = lent_without_room  # type: ignore[method-assign]


if VARIABLE in os.environ:
    begin()
