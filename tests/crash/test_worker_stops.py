"""A worker is killed, or stopped for a while, at each point of a task's way: what becomes of that task and others.

T11, T19, W1, W5. Wherever it happens: each future is settled once, no task runs twice, what had not begun is run by
the next worker, and nobody else's task is touched.
"""

from __future__ import annotations

import signal
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

import fdpool
from fdpool import Pool
from tests.crash.worker_tasks import begin, note_and_stop, work, work_with
from tests.process_state import wait_until

from . import points

TASKS = 12
POINTS = ["while it boots", "while it runs", *points.WORKER]
#: Points at which a task has begun, and its answer is not sent.
BEGUN = ["while it loads", "while it runs", "after it has run", "before it answers"]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    path.touch()
    return path


class Run:
    """Tasks on two workers, one of which stops at a point."""

    def __init__(self, pool: Pool, name: str, folder: Path, ledger: Path) -> None:
        self._pool = pool
        self._folder = folder
        self._ledger = ledger
        self._stop_in = str(folder) if name == "while it runs" else None
        self.called_back: Counter[Future[int]] = Counter()

    def submit(self, carrying: bool = False, first: int = 0, count: int = TASKS) -> list[Future[int]]:
        futures = []
        for number in range(first, first + count):
            if carrying:
                with open(__file__) as file:
                    future = self._pool.submit(work_with, str(self._ledger), number, self._stop_in, file)
            else:
                future = self._pool.submit(work, str(self._ledger), number, self._stop_in)
            future.add_done_callback(lambda done: self.called_back.update([done]))
            futures.append(future)
        return futures

    def let_go(self, how: signal.Signals) -> None:
        points.signal_stopped(self._folder, how)

    def check(self, futures: list[Future[int]]) -> list[fdpool.WorkerLost]:
        """Each future has one outcome, and each task ran as often as that says; returns the errors."""
        lost = []
        errors = [future.exception(20) for future in futures]
        ran = Counter(int(line) for line in self._ledger.read_text().split())
        for number, (future, error) in enumerate(zip(futures, errors)):
            if error is None:
                assert future.result() == number * number
                assert ran[number] == 1
            else:
                assert isinstance(error, fdpool.WorkerLost)
                assert ran[number] <= (1 if error.may_have_run else 0)
                lost.append(error)
        wait_until(lambda: len(self.called_back) == len(futures))
        assert set(self.called_back.values()) == {1}
        return lost


@pytest.mark.parametrize("carrying", [False, True], ids=["plain", "with descriptors"])
@pytest.mark.parametrize("name", POINTS)
def test_a_worker_killed_at_any_point_costs_its_own_task_at_most(
    name: str, carrying: bool, tmp_path: Path, ledger: Path
) -> None:
    points.arm(tmp_path)
    with Pool(2, initializer=begin, initargs=(name, str(tmp_path))) as pool:
        run = Run(pool, name, tmp_path, ledger)
        futures = run.submit(carrying)
        points.stopped(tmp_path)
        # While it stands, everything but its own task is done by the other.
        wait_until(lambda: sum(future.done() for future in futures) >= TASKS - 1)
        run.let_go(signal.SIGKILL)
        lost = run.check(futures)
    expected = name in BEGUN or (carrying and name == "after it has received")
    assert [error.may_have_run for error in lost] == ([name in BEGUN] if expected else [])
    assert all(error.signal == signal.SIGKILL for error in lost)


@pytest.mark.parametrize("name", POINTS)
def test_a_worker_that_stands_still_at_any_point_and_goes_on_loses_nothing(
    name: str, tmp_path: Path, ledger: Path
) -> None:
    points.arm(tmp_path)
    with Pool(2, initializer=begin, initargs=(name, str(tmp_path))) as pool:
        run = Run(pool, name, tmp_path, ledger)
        futures = run.submit()
        points.stopped(tmp_path)
        wait_until(lambda: sum(future.done() for future in futures) >= TASKS - 1)
        run.let_go(signal.SIGCONT)
        assert run.check(futures) == []


def wait_for_all(futures: list[Future[int]], folder: Path) -> None:
    """Return once all are done, or one cannot be, as its worker stands at the point."""
    wait_until(lambda: points.reached(folder) or all(future.done() for future in futures))


@pytest.mark.parametrize("name", ["while it runs", "while it loads", *points.WORKER_OF_SEVERAL])
def test_of_tasks_that_came_together_no_more_than_the_running_one_is_lost(
    name: str, tmp_path: Path, ledger: Path
) -> None:
    with Pool(1, initializer=begin, initargs=(name, str(tmp_path))) as pool:
        run = Run(pool, name, tmp_path, ledger)
        futures: list[Future[int]] = []
        points.arm(tmp_path)
        while not points.reached(tmp_path):
            # More than are sent one by one; and again, as nothing is sent together until tasks have been short.
            round_of = run.submit(first=len(futures), count=100)
            futures += round_of
            wait_for_all(round_of, tmp_path)
        run.let_go(signal.SIGKILL)
        lost = run.check(futures)
    # An answer is written down before the next task begins, and so is none lost that was not sent.
    assert len(lost) == (0 if name in points.WORKER_OF_SEVERAL else 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGCONT])
@pytest.mark.parametrize("name", ["while it runs", "after it has received", "before it answers"])
def test_no_item_of_a_map_runs_twice_wherever_its_worker_stops(
    name: str, how: signal.Signals, tmp_path: Path, ledger: Path
) -> None:
    points.arm(tmp_path)
    with Pool(2, initializer=begin, initargs=(name, str(tmp_path))) as pool:
        folder = str(tmp_path) if name == "while it runs" else "/nowhere"
        results = pool.map(note_and_stop, [str(ledger)] * 64, [folder] * 64, range(64), chunksize=16)
        points.stopped(tmp_path)
        points.signal_stopped(tmp_path, how)
        got = []
        try:
            got.extend(results)
        except fdpool.WorkerLost:
            assert how is signal.SIGKILL
        else:
            assert got == list(range(64))
    ran = Counter(ledger.read_text().split())
    assert set(ran.values()) == {1}
    if how is signal.SIGCONT:
        assert len(ran) == 64
