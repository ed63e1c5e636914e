"""Snapshots of a pool, as `Pool.stats()` takes them: plain values, true for a moment."""

from typing import NamedTuple


class PoolWorkerStats(NamedTuple):
    """One worker.

    Attributes:
        slot: number of its place; a replacement has the same.
        generation: counts the workers of that place, from 1.
        pid: None as long as it is starting.
        state: "starting", "ready" or "leaving".
        running: what errors would call the task that it runs; None if it runs none.
        running_s: for how long, in seconds.
        waiting: tasks that were given to it and have not begun.
    """

    slot: int
    generation: int
    pid: int | None
    state: str
    running: str | None
    running_s: float
    waiting: int


class LeftStats(NamedTuple):
    """What tasks have left behind in their workers, so far.

    Attributes:
        descriptors, threads, children: how many.
        latest: in words, oldest first; 100 at most.
    """

    descriptors: int
    threads: int
    children: int
    latest: tuple[str, ...]


class PoolStats(NamedTuple):
    """A whole pool.

    Attributes:
        workers: those that are there, by slot.
        submitted: tasks so far; a map's items count as chunks where they travel so.
        unsettled: tasks whose futures are not done.
        queued: those of them that no worker was given.
        postponed: those that wait for their next attempt.
        retried: how often a task was tried again.
        lost_workers: workers that died, or were ended for their task's sake.
        recycled: workers that were replaced by rule (`max_tasks_per_child`, `max_memory`, `max_age`,
            `max_fds_growth`, `idle_timeout`), or as a task had changed what cannot be undone.
        supervisor_restarts: how often the pool had to start a new supervisor.
        left: what tasks have left behind.
        strays: messages that no worker had a reason to send, and that were passed over: of a child that a task has
            forked, say, or of a program that was handed the wrong descriptor.
    """

    workers: tuple[PoolWorkerStats, ...]
    submitted: int
    unsettled: int
    queued: int
    postponed: int
    retried: int
    lost_workers: int
    recycled: int
    supervisor_restarts: int
    left: LeftStats
    strays: int
