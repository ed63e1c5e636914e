"""`map` without a chunk size: items travel together, and nobody can tell, but for the time that it takes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool import Pool
from fdpool._fixtures.pools import PoolFactory
from tests.process_state import wait_until

from . import helpers


@pytest.fixture
def pool(worker_pool_factory: PoolFactory) -> Pool:
    return worker_pool_factory(2)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    path.touch()
    return path


def ran(ledger: Path) -> list[int]:
    return sorted(map(int, ledger.read_text().split()))


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 1000, 70_000])
def test_every_item_once_and_in_order(pool: Pool, count: int) -> None:
    assert list(pool.map(helpers.square, range(count))) == [n * n for n in range(count)]
    assert list(pool.map(pow, range(count), [2] * count)) == [n * n for n in range(count)]


@pytest.mark.parametrize(
    "items", [range(0), range(7, 8), range(5, -400, -3), range(1 << 70, (1 << 70) + 300)]
)
def test_a_range_is_mapped_as_the_list_of_its_items(pool: Pool, items: range) -> None:
    assert list(pool.map(helpers.square, items)) == list(pool.map(helpers.square, list(items)))


def test_items_of_all_lengths_come_in_order(pool: Pool) -> None:
    dice = random.Random(3)
    seconds = [dice.choice([0, 0, 0, 1e-5, 1e-4, 3e-3]) for _ in range(600)]
    assert list(pool.map(helpers.wait_and_tell, range(600), seconds)) == list(range(600))


def test_an_item_that_fails_does_so_alone(pool: Pool, ledger: Path) -> None:
    results = pool.map(partial(helpers.note_or_fail, str(ledger)), range(400))
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="^7$") as caught:
        next(results)
    assert "note_or_fail" in str(caught.value.__cause__)  # the traceback from the worker
    pool.shutdown()
    done = ran(ledger)
    assert len(set(done)) == len(done)


@pytest.mark.parametrize("how", ["stop", "exit", "lambda", "unpicklable"])
def test_whatever_an_item_does_its_neighbours_have_their_results(pool: Pool, how: str) -> None:
    kind = {
        "stop": RuntimeError,  # what a generator makes of StopIteration
        "exit": SystemExit,
        "lambda": fdpool.NotPicklable,
        "unpicklable": fdpool.NotPicklable,
    }[how]
    futures = [pool.map(helpers.odd_one_out, range(start, start + 64), [how] * 64) for start in (0, 36, 63)]
    for results, good in zip(futures, (63, 27, 0)):
        assert [next(results)[0] for _ in range(good)] == list(range(63 - good, 63))
        if how == "lambda":
            assert next(results)[1]() == 5  # these do travel
        else:
            with pytest.raises(kind):
                next(results)


def test_an_item_that_kills_its_worker_takes_no_later_one_along(pool: Pool, ledger: Path) -> None:
    results = pool.map(partial(helpers.note_or_die, str(ledger)), range(300))
    with pytest.raises(fdpool.WorkerLost):
        list(results)
    pool.map(partial(helpers.note_or_die, str(ledger)), range(300))  # nobody reads these
    pool.shutdown()
    done = ran(ledger)
    assert done.count(150) == 0
    assert done.count(299) >= 1
    assert all(done.count(n) <= 2 for n in set(done))


@pytest.mark.parametrize("count", [40, 2000])
def test_a_long_item_holds_up_no_other_while_a_worker_is_idle(pool: Pool, tmp_path: Path, count: int) -> None:
    gate, ledger = tmp_path / "gate", tmp_path / "ledger"
    os.mkfifo(gate)
    ledger.touch()
    results = pool.map(partial(helpers.note_or_wait, str(ledger), str(gate)), range(count))
    wait_until(lambda: len(ran(ledger)) == count - 1)
    with open(gate, "wb"):
        pass
    assert list(results) == list(range(count))
    assert ran(ledger) == list(range(count))  # each once


def test_results_with_more_descriptors_than_a_message_holds(pool: Pool) -> None:
    files = list(pool.map(helpers.open_null, range(300)))
    assert len(files) == 300
    for file in files:
        file.close()


def test_arguments_with_descriptors_go_one_by_one(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("some")
    files = [open(path) for _ in range(30)]
    results = pool.map(helpers.read_all, files)
    for file in files:
        file.close()
    assert list(results) == ["some"] * 30


def test_large_items_travel_in_memory_files(pool: Pool) -> None:
    items = [bytes([n % 256]) * 300_000 for n in range(64)]
    assert list(pool.map(helpers.first_and_length, items)) == [(n % 256, 300_000) for n in range(64)]


def test_an_item_that_cannot_be_pickled_fails_alone(pool: Pool) -> None:
    items: list[Any] = [1, 2, sys._getframe(), 4]
    results = pool.map(helpers.square, items * 16)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(fdpool.NotPicklable):
        next(results)


def test_closing_the_iterator_cancels_what_has_not_begun(ledger: Path) -> None:
    with Pool(1) as pool:
        results = pool.map(partial(helpers.note_slowly, str(ledger)), range(5000))
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
    assert len(ran(ledger)) < 4500


def test_items_of_a_chunk_that_is_running_stop_with_the_iterator(ledger: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Pool(1) as pool:
        results = pool.map(partial(helpers.note_slower_or_wait, str(ledger), str(gate)), range(400))
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        gate.touch()
    assert len(ran(ledger)) < 20


@pytest.mark.parametrize("chunksize", [None, 1])
def test_what_items_share_and_change_is_each_ones_own(pool: Pool, chunksize: int | None) -> None:
    dice = random.Random(1)
    first = random.Random(1).random()
    numbers = pool.map(helpers.throw, range(50), [dice] * 50, chunksize=chunksize)
    assert list(numbers) == [first] * 50
    assert list(pool.map(helpers.Counter().count, range(50), chunksize=chunksize)) == [1] * 50
    seen: list[int] = []

    def remember(number: int) -> int:
        seen.append(number)
        return len(seen)

    assert list(pool.map(remember, range(50), chunksize=chunksize)) == [1] * 50
    assert list(pool.map(helpers.same_list_again, range(50), chunksize=chunksize)) == [[n] for n in range(50)]


def test_shutdown_can_drop_the_rest(ledger: Path) -> None:
    pool = Pool(1)
    results = pool.map(partial(helpers.note_slowly, str(ledger)), range(5000))
    assert next(results) == 0
    pool.shutdown(cancel_futures=True)
    assert len(ran(ledger)) < 4500


def test_shutdown_finishes_what_was_cut(ledger: Path) -> None:
    pool = Pool(2)
    pool.map(partial(helpers.note_slowly, str(ledger)), range(100))
    pool.shutdown()
    assert ran(ledger) == list(range(100))


@pytest.mark.usefixtures("heeding_the_terminal")
def test_ctrl_c_in_a_worker_fails_one_item(pool: Pool) -> None:
    [first] = [pool.submit(os.getpid).result()]
    results = pool.map(helpers.interrupt_me_at, range(64), [20] * 64)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert first in pool.worker_pids()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_that_returns_from_an_item_runs_no_other(pool: Pool, ledger: Path) -> None:
    results = pool.map(partial(helpers.note_or_fork, str(ledger)), range(3000))
    assert list(results) == list(range(3000))
    pool.shutdown()
    assert ran(ledger) == list(range(1501, 1510))


def test_a_deadline_counts_from_the_call(pool: Pool) -> None:
    began = time.monotonic()
    with pytest.raises(FutureTimeoutError):
        list(pool.map(time.sleep, [0.0] * 8 + [30.0] * 8, timeout=1.0))
    assert time.monotonic() - began < 10
    pool.kill_workers()


def test_an_error_ends_the_results_and_cancels_what_has_not_begun(tmp_path: Path) -> None:
    noted, gate = tmp_path / "noted", tmp_path / "gate"
    noted.touch()
    with Pool(1) as pool:
        results = pool.map(partial(helpers.note_fail_or_wait, str(noted), str(gate)), range(5000))
        assert list(itertools.islice(results, 7)) == list(range(7))
        with pytest.raises(ValueError, match="7"):
            next(results)
        assert list(results) == []
        gate.touch()
    assert len(noted.read_text().split()) < 5000
