"""No process can be forked: a pool does with the workers it has, and goes on as soon as there can be more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fdpool
from tests.contract.helpers import sleep_with, square
from tests.process_state import wait_until

from . import no_fork


@pytest.fixture
def allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many workers a pool may have, which is none until then."""
    file = tmp_path / "processes"
    monkeypatch.setenv(no_fork.VARIABLE, str(file))

    def write(count: int) -> None:
        written = file.with_suffix(".new")
        written.write_text(str(count))
        written.rename(file)

    write(0)
    return write


def new_pool(max_workers: int) -> fdpool.Pool:
    return fdpool.Pool(max_workers, preload=["tests.crash.no_fork"])


def test_a_pool_that_may_have_no_further_worker_does_with_those_it_has(allow: Callable[[int], None]) -> None:
    allow(2)
    with new_pool(8) as pool, open(os.devnull) as null:
        slow = [pool.submit(sleep_with, [null], 0.2) for _ in range(8)]
        assert [pool.submit(square, n).result(timeout=20) for n in range(20)] == [n * n for n in range(20)]
        for future in slow:
            future.result(timeout=20)
        assert len(pool.worker_pids()) == 2
        assert pool.stats().lost_workers == 0


def test_a_pool_has_more_workers_as_soon_as_it_may(allow: Callable[[int], None]) -> None:
    allow(1)
    with new_pool(2) as pool:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        behind = pool.submit(square, 3)
        wait_until(lambda: any(link.last_exit.refused for link in pool._client.links.values()))
        allow(2)
        assert behind.result(timeout=20) == 9
        assert running.running()
        pool.kill_workers()


def test_a_pool_whose_only_worker_dies_while_no_other_may_be_forked_goes_on_when_one_may(
    allow: Callable[[int], None],
) -> None:
    allow(1)
    with new_pool(3) as pool:
        [worker] = {pool.submit(os.getpid).result(timeout=20)}
        allow(0)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: pool.stats().lost_workers == 1)
        behind = [pool.submit(square, n) for n in range(3)]
        wait_until(lambda: pool._client._short_since is not None)
        allow(1)
        assert [future.result(timeout=20) for future in behind] == [0, 1, 4]


def test_a_pool_for_which_no_worker_may_be_forked_breaks_in_the_end(
    allow: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once if it never had one."""
    with new_pool(2) as pool, pytest.raises(fdpool.PoolBroken, match="fork failed"):
        pool.submit(square, 3).result(timeout=20)
    allow(1)
    with new_pool(2) as pool:
        worker = pool.submit(os.getpid).result(timeout=20)
        monkeypatch.setattr("fdpool._client._SHORT_S", 0.1)
        allow(0)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: pool.stats().lost_workers == 1)
        with pytest.raises(fdpool.PoolBroken, match="fork failed"):
            pool.submit(square, 3).result(timeout=20)
