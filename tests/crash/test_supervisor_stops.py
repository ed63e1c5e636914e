"""A supervisor is stopped for a while, or killed, at each point of a worker's life that it has a part in."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import fdpool
from fdpool import Pool
from tests.contract import helpers
from tests.process_state import living, seconds_until_gone, wait_until

from . import no_room, points, reaping_by_others
from .worker_tasks import leave_program, stay

# That of a first pool, a child of this process, which can tell how it ended.
pytestmark = pytest.mark.usefixtures("fresh_supervisors")


@contextmanager
def pool_whose_supervisor_stops_at(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Pool, list[Future[int]], Counter[Future[int]]]]:
    """Tasks that have been submitted, some before a worker's death or end; how often each future called back."""
    stubborn: Future[None] | None = None
    ledger = folder / "ledger"
    ledger.touch()
    called_back: Counter[Future[int]] = Counter()
    monkeypatch.setenv(points.VARIABLE, f"{name}@{folder}")
    ends = name in points.SUPERVISOR_THAT_ENDS
    with Pool(2, min_workers=2 if ends else 0, preload=["tests.crash.supervisor_stops"]) as pool:
        if "reap" in name or "death" in name:
            assert pool.submit(helpers.square, 2).result(20) == 4
            points.arm(folder)
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
        elif ends:
            assert pool.submit(helpers.square, 2).result(20) == 4
            # So nothing but this end is asked of the supervisor.
            wait_until(lambda: [worker.state for worker in pool.stats().workers] == 2 * ["ready"])
            points.arm(folder)
            stubborn = pool.with_options(timeout=0.1, grace=0.1).submit(stay, str(ledger))
        else:
            points.arm(folder)
        futures = []
        for number in range(12):
            future = pool.submit(helpers.note, str(ledger), number)
            future.add_done_callback(lambda done: called_back.update([done]))
            futures.append(future)
        points.stopped(folder)
        yield pool, futures, called_back
        if stubborn is not None:
            assert isinstance(stubborn.exception(20), fdpool.TaskTimeout)
    wait_until(lambda: len(called_back) == len(futures))
    assert set(called_back.values()) == {1}
    ran = Counter(ledger.read_text().split())
    assert set(ran.values()) <= {1}, "a task ran twice"
    assert len(ran) >= sum(future.exception() is None for future in futures)


def test_a_death_is_seen_where_somebody_else_reaps_the_supervisors_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S13."""
    monkeypatch.setenv(reaping_by_others.VARIABLE, "library")
    with Pool(1, preload=["tests.crash.reaping_by_others"]) as pool:
        with pytest.raises(fdpool.WorkerLost, match="nobody knows how|status"):
            pool.submit(os._exit, 3).result(20)
        assert pool.submit(helpers.square, 3).result(20) == 9


def test_a_worker_that_the_kernel_has_reaped_is_seen_to_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """S13: SIGCHLD is ignored, so it does not tell. The supervisor outlives it."""
    monkeypatch.setenv(reaping_by_others.VARIABLE, "kernel")
    with Pool(1, preload=["tests.crash.reaping_by_others"]) as pool:
        for _ in range(3):
            assert isinstance(pool.submit(os._exit, 3).exception(20), fdpool.WorkerLost)
        late = pool.with_options(timeout=0.2, grace=0).submit(time.sleep, 600)
        assert isinstance(late.exception(20), fdpool.TaskTimeout)
        assert pool.submit(helpers.square, 3).result(20) == 9
        assert pool.stats().supervisor_restarts == 0
        pool.kill_workers()


def test_a_worker_that_the_kernel_reaps_at_once_is_seen_to_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """S13: before it has a pidfd, which would tell."""
    monkeypatch.setenv(reaping_by_others.VARIABLE, "quick kernel")
    with Pool(1, preload=["tests.crash.reaping_by_others"]) as pool:
        futures = [pool.submit(os._exit, 3) for _ in range(2)]
        assert [type(future.exception(20)) for future in futures] == 2 * [fdpool.WorkerLost]
        assert pool.submit(helpers.square, 3).result(20) == 9
        assert pool.stats().supervisor_restarts == 0


@pytest.mark.parametrize("name", [*points.SUPERVISOR, *points.SUPERVISOR_THAT_ENDS])
def test_a_supervisor_that_stands_still_at_any_point_and_goes_on_loses_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool_whose_supervisor_stops_at(name, tmp_path, monkeypatch) as (_, futures, _):
        points.signal_stopped(tmp_path, signal.SIGCONT)
        assert [future.result(20) for future in futures] == list(range(12))


@pytest.mark.parametrize("name", [*points.SUPERVISOR, *points.SUPERVISOR_THAT_ENDS])
def test_a_supervisor_killed_at_any_point_costs_what_ran_and_leaves_no_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W4: there is another at once, which starts others in their places."""
    with pool_whose_supervisor_stops_at(name, tmp_path, monkeypatch) as (pool, futures, _):
        tree = psutil.Process(points.stopped(tmp_path)).children(recursive=True)
        points.signal_stopped(tmp_path, signal.SIGKILL)
        assert seconds_until_gone(tree) < 4.0
        errors = [future.exception(20) for future in futures]
        lost = [error for error in errors if error is not None]
        assert len(lost) <= 2, "more than the workers can have run"
        assert all(isinstance(error, fdpool.WorkerLost) for error in lost)
        assert all("supervisor was killed by SIGKILL" in str(error) for error in lost)
        done = [number for number, error in enumerate(errors) if error is None]
        assert [futures[number].result() for number in done] == done
        assert pool.submit(helpers.square, 3).result(20) == 9


@pytest.mark.parametrize("room", ["but one", "none"])
def test_a_supervisor_without_descriptors_ends_what_it_should_and_nothing_else(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3."""
    monkeypatch.setenv(no_room.VARIABLE, room)
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    os.mkfifo(gate)
    with Pool(2, preload=["tests.crash.no_room"]) as pool:
        running = pool.submit(helpers.wait_at, str(gate))
        wait_until(running.running)
        stays = pool.with_options(timeout=0.3, grace=0.05).submit(leave_program, str(ledger), stay=True)
        assert isinstance(stays.exception(20), fdpool.TaskTimeout)
        goes = pool.submit(leave_program, str(ledger), stay=False)
        assert isinstance(goes.exception(20), fdpool.WorkerLost)
        left = living(map(int, ledger.read_text().split()))
        assert seconds_until_gone(left, 20.0) < 20
        assert pool.submit(helpers.square, 3).result(20) == 9
        assert running.running()
        gate.write_text("")
        running.result(20)
        assert pool.stats().supervisor_restarts == 0
