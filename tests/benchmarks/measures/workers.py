"""Many workers, and many tasks: the cost of a task must not grow with either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .. import peers
from .._measure import Measure, Outcome, Round, Settings, by_peer, within
from ..work import noop

TASKS = 2000


@contextmanager
def flood(name: str, workers: int, tasks: int) -> Iterator[Round]:
    with peers.opened(name, workers) as pool:
        each = [()] * tasks

        def one_round() -> Outcome:
            pool.many(noop, each)
            return Outcome(tasks)

        yield one_round


def of_tasks(name: str, settings: Settings) -> AbstractContextManager[Round]:
    """So many tasks at once, for two workers."""
    return flood(name, 2, settings.size)


def of_workers(name: str, settings: Settings) -> AbstractContextManager[Round]:
    """So many workers."""
    return flood(name, settings.size, TASKS)


def many(workers: int) -> Measure:
    return Measure(
        f"workers-{workers}",
        "Scale",
        f"2000 × `submit(noop)` to {workers} workers, all results; a task",
        {
            **by_peer(of_workers, ("fdpool", "ppe", "mp")),
            "two": lambda _settings: flood("fdpool", 2, TASKS),
        },
        size=workers,
        quick_size=workers // 8,
        rounds=11,
        quick_rounds=1,
        goals=(within("two", 1.5),),
        labels={"two": "fdpool with 2 workers"},
    )


MEASURES = (
    Measure(
        "flood-large",
        "Scale",
        "200,000 × `submit(noop)`, all results; a task",
        {
            **by_peer(of_tasks, ("fdpool", "mp")),
            "small": lambda settings: flood("fdpool", 2, settings.size // 20),
        },
        size=200_000,
        quick_size=4000,
        rounds=3,
        quick_rounds=1,
        warm_up=False,
        goals=(within("small", 1.3),),
        labels={"small": "fdpool, 10,000"},
    ),
    many(64),
    many(256),
)
