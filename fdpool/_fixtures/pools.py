"""Pools for tests: fresh ones that end with their test, and a shared one that is audited between tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from .._clock import CLOCK
from .._lifetime import Phase
from ..pool import Pool
from . import census, coverage, importing
from .holdings import MEMORY

#: How long a task that still runs at the end of its test may go on.
GRACE_S = 1.0

_GONE_S = 10.0
_TIDY_S = 0.3  # how long a worker may take to tidy up after its last task


class PoolFactory:
    """Makes pools, of the arguments of `fdpool.Pool`, and ends them all; the fixture `worker_pool_factory` is one."""

    def __init__(self) -> None:
        self._pools: list[Pool] = []

    def __call__(self, max_workers: int | None = None, **options: Any) -> Pool:
        pool = new_pool(max_workers, **options)
        self._pools.append(pool)
        return pool

    def close(self) -> None:
        """End the pools, the last one first; what still runs in them is killed after a second."""
        while self._pools:
            end(self._pools.pop())


def new_pool(max_workers: int | None = None, **options: Any) -> Pool:
    """A pool whose workers do for a test run what the process of the tests does."""
    return Pool(max_workers, **importing.with_pool_options(coverage.with_pool_options(options)))


def end(pool: Pool, grace_s: float = GRACE_S) -> None:
    """Shut a pool down, and kill what runs in it if that takes longer than `grace_s` seconds."""
    timer = threading.Timer(grace_s, pool.kill_workers)
    timer.daemon = True
    timer.start()
    try:
        pool.shutdown(cancel_futures=True)
    finally:
        timer.cancel()
        timer.join()


# -- the shared pool ------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """What one worker has that a task can leave changed, as it is seen from outside."""

    descriptors: Counter[str]
    threads: int
    children: int
    folder: str
    umask: str


class SharedPool:
    """A pool that many tests use, one after the other: made when first needed, mended after each.

    Args:
        make: makes the pool.
    """

    def __init__(self, make: Callable[[], Pool]) -> None:
        self._make = make
        self._pool: Pool | None = None
        self._clean: Profile | None = None

    def begin(self) -> Pool:
        """The pool, fit for use."""
        if self._pool is None:
            self._pool = self._make()
            self._clean = profile(self._pool.submit(os.getpid).result())
            self._see(profile(self._pool.submit(os.getpid).result()))
        return self._pool

    def audit(self) -> list[str]:
        """Look at every worker after a test, replace those that are not as they were; what there was to mend."""
        pool = self._pool
        assert pool is not None
        if pool._client.life.phase is not Phase.SERVING or pool._client.life.is_broken:
            self.close()
            return ["it was shut down or broken; it belongs to all tests: take worker_pool for that"]
        found = self._end_running(pool)
        for pid in pool.worker_pids():
            if (changed := self._changed(pid)) and _kill(pool, pid):
                found += [f"worker {pid} was replaced, as it was left with {what}" for what in changed]
        return found

    def _end_running(self, pool: Pool) -> list[str]:
        """Tasks that are not done: those that wait are cancelled, the workers of those that run are killed."""
        if not pool._client.tasks:
            return []
        deadline = CLOCK.monotonic() + GRACE_S
        for future in list(pool._client.tasks.values()):
            future.cancel()
        while pool._client.tasks and CLOCK.monotonic() < deadline:
            time.sleep(0.001)
        labels = [future.label for future in list(pool._client.tasks.values())]
        if not labels:
            return []
        self.close()  # there is no telling which worker runs what
        return [f"{label} was still running, and was killed" for label in labels]

    def _changed(self, pid: int) -> list[str]:
        """What a worker has for good that it had not; it may be tidying up just now, and open something for that."""
        deadline = CLOCK.monotonic() + _TIDY_S
        while (changed := self._changed_now(pid)) and CLOCK.monotonic() < deadline:
            time.sleep(0.005)
        return changed

    def _see(self, now: Profile | None) -> None:
        """What is not there now is none of what each worker has: it was tidying up when it was looked at first."""
        if self._clean is not None and now is not None:
            self._clean = self._clean._replace(descriptors=self._clean.descriptors & now.descriptors)

    def _changed_now(self, pid: int) -> list[str]:
        now = profile(pid)
        self._see(now)
        clean = self._clean
        if clean is None or now is None:
            return []
        extra = now.descriptors - clean.descriptors
        changed = [f"{count} more open: {what}" for what, count in extra.items()]
        if now.threads > clean.threads:
            changed.append(f"{now.threads - clean.threads} more threads")
        if now.children:
            changed.append(f"{now.children} child processes")
        if now.folder != clean.folder:
            changed.append(f"{now.folder} as its working directory")
        if now.umask != clean.umask:
            changed.append(f"the umask {now.umask}")
        return changed

    def close(self) -> None:
        """End the pool, if there is one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            end(pool)


def profile(pid: int) -> Profile | None:
    """What a process has; None if it is gone, or there is no /proc."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        folder = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None
    open_now = census.descriptors(pid).values()
    return Profile(
        Counter(what.partition(":[")[0] for what in open_now if not what.startswith(MEMORY)),
        int(status["Threads"]),
        len(census.descendants(pid)),
        folder,
        status.get("Umask", ""),
    )


def _kill(pool: Pool, pid: int) -> bool:
    """End a worker by SIGKILL, and wait until the pool knows; False if it was gone already."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if pid not in pool.worker_pids():  # somebody else has its number by now
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    deadline = CLOCK.monotonic() + _GONE_S
    while pid in pool.worker_pids() and CLOCK.monotonic() < deadline:
        time.sleep(0.001)
    return True
