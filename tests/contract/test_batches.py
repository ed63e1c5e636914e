"""Tasks that travel together: they are run, answered, lost, cancelled and taken back as if each came by itself."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool import Pool, _messages
from fdpool._cpus import usable_cpus
from fdpool.errors import WireError
from tests.contract import helpers
from tests.process_state import wait_until


class Gate:
    """A task that holds its worker until it is let go, and that carries no descriptor."""

    def __init__(self, folder: Path) -> None:
        self._fifo = folder / "gate"
        os.mkfifo(self._fifo)
        self._begun = folder / "gate.begun"

    def submit(self, pool: Pool) -> Future[None]:
        self._begun.unlink(missing_ok=True)
        return pool.submit(helpers.wait_at, str(self._fifo))

    def wait_until_begun(self) -> None:
        wait_until(self._begun.exists)

    def open(self) -> None:
        with open(self._fifo, "wb"):
            pass


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def warm(pool: Pool) -> None:
    """Let the pool see that tasks are short, so that it sends many together."""
    while pool._client.dispatcher.batch < 8:
        for future in [pool.submit(helpers.nothing) for _ in range(200)]:
            future.result(timeout=20)


def flood(pool: Pool, count: int) -> list[Future[int]]:
    return [pool.submit(helpers.square, n) for n in range(count)]


def send_together(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, submit: Callable[[], list[Future[Any]]]
) -> list[Future[Any]]:
    """What `submit` submits, four to a message."""
    client, dispatcher = pool._client, pool._client.dispatcher
    with monkeypatch.context() as queueing:  # until all are there, or the first would travel alone
        queueing.setattr(
            dispatcher, "submitted", lambda task, alone: dispatcher.queued.update({task: alone}) or ()
        )
        futures = submit()
        pool.stats()
    with client.critical:
        dispatcher.batch = 4
        client.perform(dispatcher.assign())
    return futures


def retire(pool: Pool, slot: int) -> None:
    """As if the slot's worker had reached its `max_age`."""
    client = pool._client
    with client.critical:
        client.perform(client.staffing._retire(slot, client.dispatcher.generation(slot)))


def test_a_flood_is_sent_in_batches_and_every_result_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """P13."""
    with Pool(2) as pool:
        warm(pool)
        sizes: list[int] = []
        send = pool._client.inboxes._send_batch

        def counted(slot: int, tasks: Any) -> Any:
            sizes.append(len(tasks))
            return send(slot, tasks)

        monkeypatch.setattr(pool._client.inboxes, "_send_batch", counted)
        futures = flood(pool, 3000)
        assert [future.result() for future in futures] == [n * n for n in range(3000)]
    assert sizes
    assert max(sizes) >= 4


def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    """P13: neither here nor in the worker is anything kept of a task that is done, be it a byte."""

    def blocks() -> tuple[int, int]:
        gc.collect()
        return sys.getallocatedblocks(), pool.submit(helpers.allocated_blocks).result(timeout=20)

    def run(waves: int) -> None:
        for _ in range(waves):
            assert [future.result(timeout=20) for future in flood(pool, 2000)] == [n * n for n in range(2000)]

    with Pool(1) as pool:
        run(3)  # what is made once, and the caches, are there
        before = blocks()
        run(5)
        here, there = (after - earlier for after, earlier in zip(blocks(), before))
    assert here < 1000
    assert there < 1000


def test_a_long_task_holds_up_none_that_travelled_with_it(gate: Gate, tmp_path: Path) -> None:
    """P13: neither those before it, whose answers lie on the board, nor those behind it, which another worker runs."""
    ledger = tmp_path / "ledger"
    ledger.touch()
    with Pool(2) as pool:
        warm(pool)
        for _ in range(3):
            before = [pool.submit(helpers.note, str(ledger), n) for n in range(500)]
            long = gate.submit(pool)
            behind = [pool.submit(helpers.note, str(ledger), n) for n in range(500, 1000)]
            for n, future in enumerate(before + behind):
                assert future.result(timeout=20) == n
            assert not long.done()
            gate.open()
            long.result(timeout=20)
    assert sorted(map(int, ledger.read_text().split())) == sorted(3 * list(range(1000)))  # each ran once


def test_what_travelled_with_a_long_task_can_be_cancelled(gate: Gate) -> None:
    with Pool(1) as pool:
        warm(pool)
        first = flood(pool, 300)
        long = gate.submit(pool)
        behind = flood(pool, 300)
        gate.wait_until_begun()
        assert all(future.cancel() for future in reversed(behind))
        assert not long.cancel()
        gate.open()
        long.result(timeout=20)
        assert [future.result(timeout=20) for future in first] == [n * n for n in range(300)]
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_a_worker_that_is_to_leave_does_so_after_something_behind_its_task_was_cancelled(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For that its inbox is emptied, where the word to leave lies."""
    with Pool(1) as pool:
        old = pool.submit(os.getpid).result(timeout=20)
        long, *behind = send_together(
            pool, monkeypatch, lambda: [gate.submit(pool), *(pool.submit(os.getpid) for _ in range(7))]
        )
        gate.wait_until_begun()
        retire(pool, 0)
        behind[0].cancel()
        gate.open()
        long.result(timeout=20)
        assert all(future.result(timeout=20) for future in behind[1:])
        assert pool.submit(os.getpid).result(timeout=20) != old


def test_a_long_task_holds_up_none_though_its_worker_is_to_leave(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = Gate(tmp_path / "other")
    with Pool(2) as pool:
        busy = other.submit(pool)
        other.wait_until_begun()
        long, *behind = send_together(
            pool, monkeypatch, lambda: [gate.submit(pool), *(pool.submit(os.getpid) for _ in range(11))]
        )
        gate.wait_until_begun()
        retire(pool, 1)
        other.open()
        busy.result(timeout=20)
        assert all(future.result(timeout=20) for future in behind)
        assert not long.done()
        gate.open()


def test_a_worker_that_dies_in_a_batch_loses_one_task_and_no_other_runs_twice(tmp_path: Path) -> None:
    """P6: `ok, _exit, ok` in one message: both `ok` come back."""
    ledger = tmp_path / "ledger"
    dice = random.Random(7)
    ledger.touch()
    with Pool(2) as pool:
        warm(pool)
        deadly = {dice.randrange(600) for _ in range(6)}
        futures: list[Future[Any]] = []
        for n in range(600):
            if n in deadly:
                futures.append(pool.submit(os._exit, 3))
            else:
                futures.append(pool.submit(helpers.note, str(ledger), n))
        wait(futures, timeout=60)
        for n, future in enumerate(futures):
            if n in deadly:
                error = future.exception(timeout=1)
                assert isinstance(error, fdpool.WorkerLost), error
                assert error.may_have_run
            else:
                assert future.result(timeout=1) == n
    ran = sorted(int(line) for line in ledger.read_text().split())
    assert ran == [n for n in range(600) if n not in deadly]


def test_a_task_that_fails_or_answers_at_length_in_a_batch_is_its_own_affair(tmp_path: Path) -> None:
    kinds = (helpers.square, helpers.fail_with, helpers.many_bytes, helpers.open_null)
    with Pool(2) as pool:
        warm(pool)
        futures: list[Future[Any]] = [pool.submit(kinds[n % 4], n) for n in range(800)]
        for n, future in enumerate(futures):
            if n % 4 == 0:
                assert future.result(timeout=20) == n * n
            elif n % 4 == 1:
                with pytest.raises(ValueError, match=f"^{n}$"):
                    future.result(timeout=20)
            elif n % 4 == 2:
                assert future.result(timeout=20) == bytes(n * 200)
            else:
                with future.result(timeout=20) as file:
                    assert os.fstat(file.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_the_pool_goes_on_after_all_that_was_queued_has_been_cancelled(tmp_path: Path) -> None:
    with Pool(1) as pool:
        warm(pool)
        for round_number in range(5):
            may_go_on = tmp_path / str(round_number)
            futures: list[Future[None]] = [pool.submit(time.sleep, 0.002) for _ in range(30)]
            # Those behind it can be cancelled however late this is done.
            futures.append(pool.submit(wait_until, may_go_on.exists))
            futures += [pool.submit(time.sleep, 0.002) for _ in range(30)]
            cancelled = [future.cancel() for future in reversed(futures)]
            assert any(cancelled)
            may_go_on.touch()
            wait(futures, timeout=20)
            assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_workers_with_a_limit_of_tasks_are_sent_one_by_one() -> None:
    with Pool(1, max_tasks_per_child=5) as pool:
        futures = flood(pool, 60)
        assert [future.result(timeout=30) for future in futures] == [n * n for n in range(60)]
        assert pool._client.dispatcher.batch == 1


def test_tasks_that_begin_to_take_long_are_sent_one_by_one_again() -> None:
    with Pool(1) as pool:
        warm(pool)
        for future in [pool.submit(time.sleep, 0.001) for _ in range(50)]:
            future.result(timeout=20)
        assert pool._client.dispatcher.batch == 1


def test_lengths_that_do_not_add_up_are_refused() -> None:
    good = _messages.pack_header(_messages.DONE, 5, 3) + b"abc"
    assert _messages.split(good + good, 0) == [(_messages.DONE, 5, b"abc")] * 2
    assert _messages.split(b"", 0) == []
    for bad in (good[:-1], good + b"x", good + good[:19], good[:20]):
        with pytest.raises(WireError):
            _messages.split(bad, 0)


def test_a_short_task_starts_a_worker_if_all_that_are_there_are_in_long_ones(tmp_path: Path) -> None:
    """Even those that wait for it."""
    processors = usable_cpus()
    with Pool(processors + 2) as pool:
        warm(pool)
        wait_until(lambda: not pool.stats().queued)
        waiting = []
        for n in range(processors):
            waiting.append(pool.submit(helpers.meet, str(tmp_path), n, processors + 1))
            wait_until((tmp_path / f"{n}.begun").exists)
        assert pool.submit(helpers.meet, str(tmp_path), processors, processors + 1).result(timeout=60)
        assert all(future.result(timeout=60) for future in waiting)


def test_tasks_that_wait_for_each_other_all_run_though_short_ones_would_have_shared_workers(
    tmp_path: Path,
) -> None:
    """More of them than processors; those that wait behind others move on to idle workers."""
    workers = usable_cpus() + 6
    with Pool(workers) as pool:
        for round_number in range(3):
            folder = tmp_path / str(round_number)
            folder.mkdir()
            warm(pool)
            futures = [pool.submit(helpers.meet, str(folder), n, workers) for n in range(workers)]
            assert all(future.result(timeout=60) for future in futures)
