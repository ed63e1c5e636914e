"""What workers log is handled here, in order, and never holds a task up for ever."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fdpool import Pool, TaskTimeout
from tests.contract import helpers
from tests.contract.helpers_logs import flood, log_awkward, log_error, log_numbers
from tests.process_state import wait_until


@pytest.fixture
def records() -> Any:
    """Records of the logger `fdpool.test`, which is told apart from the root."""
    found: list[logging.LogRecord] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    logger = logging.getLogger("fdpool.test")
    handler = Keeper()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)


def test_records_arrive_in_order_and_before_the_result(records: list[logging.LogRecord]) -> None:
    with Pool(2, log_level="INFO") as pool:
        pool.submit(log_numbers, "fdpool.test", 300).result(timeout=20)
        wait_until(lambda: len(records) == 300)
    assert [record.getMessage() for record in records] == [f"number {n} of fdpool.test" for n in range(300)]
    assert [record.number for record in records] == list(range(300))  # type: ignore[attr-defined]
    assert {record.processName for record in records} == {"Worker-0"}


def test_each_workers_records_are_in_order(records: list[logging.LogRecord]) -> None:
    with Pool(2, log_level=logging.INFO) as pool:
        for future in [pool.submit(log_numbers, f"fdpool.test.{n}", 100) for n in range(4)]:
            future.result(timeout=20)
        wait_until(lambda: len(records) == 400)
    for n in range(4):
        mine = [record.number for record in records if record.name == f"fdpool.test.{n}"]  # type: ignore[attr-defined]
        assert mine == list(range(100))


def test_an_exception_comes_with_its_traceback(records: list[logging.LogRecord]) -> None:
    with Pool(1, log_level="INFO") as pool:
        pool.submit(log_error).result(timeout=20)
        wait_until(lambda: records)
    text = logging.Formatter().format(records[0])
    assert text.startswith("caught\nTraceback")
    assert text.endswith("ValueError: went wrong")


def test_what_cannot_travel_arrives_as_text_or_not_at_all(records: list[logging.LogRecord]) -> None:
    with Pool(1, log_level="INFO") as pool:
        pool.submit(log_awkward).result(timeout=20)
        wait_until(lambda: len(records) == 3)
    first, second, third = records
    assert first.getMessage() == "with a text of it"
    assert second.fine == 3  # type: ignore[attr-defined]
    assert not hasattr(second, "unpicklable")
    assert third.getMessage().startswith("xxxx")


def test_levels_here_and_there_are_kept_to(records: list[logging.LogRecord]) -> None:
    logging.getLogger("fdpool.test.quiet").setLevel(logging.ERROR)

    def log_all() -> None:
        logging.getLogger("fdpool.test").debug("too low there")
        logging.getLogger("fdpool.test.quiet").warning("too low here")
        logging.getLogger("fdpool.test").warning("arrives")

    with Pool(1, log_level=logging.INFO) as pool:
        pool.submit(log_all).result(timeout=20)
        wait_until(lambda: records)
    assert [record.getMessage() for record in records] == ["arrives"]


def test_without_asking_for_it_nothing_arrives(records: list[logging.LogRecord]) -> None:
    with Pool(1) as pool:
        pool.submit(log_numbers, "fdpool.test", 3).result(timeout=20)
    assert not records


def test_a_handler_that_raises_or_waits_does_not_hurt_the_pool(records: list[logging.LogRecord]) -> None:
    release = threading.Event()

    class Awkward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.wait(20)
            raise ValueError("in a handler")

    logger = logging.getLogger("fdpool.test.awkward")
    handler = Awkward()
    logger.addHandler(handler)
    try:
        with Pool(1, log_level="INFO") as pool:
            began = time.monotonic()
            pool.submit(log_numbers, "fdpool.test.awkward", 2).result(timeout=20)
            assert pool.submit(helpers.square, 3).result(timeout=20) == 9
            assert time.monotonic() - began < 10
            release.set()
    finally:
        logger.removeHandler(handler)


@pytest.mark.usefixtures("records")
def test_a_flood_of_records_ends_and_what_was_dropped_is_said() -> None:
    """The client does not read for a while: the task waits once, not for each record, and none is missing untold."""
    found: list[logging.LogRecord] = []
    logger = logging.getLogger("fdpool")
    logger.addHandler(keeper := _Keeper(found))
    try:
        with Pool(1, log_level="INFO") as pool:
            pool.submit(helpers.square, 2).result(timeout=20)
            with pool._client.receiver.undisturbed:  # nobody receives
                future = pool.submit(flood, "fdpool.test", 400, patience_s=0.2)
                wait_until(lambda: has_ended(pool), limit_s=60)
            assert future.result(timeout=20) < 10, "it has waited for each record"
            pool.submit(log_numbers, "fdpool.test", 1).result(timeout=20)
            wait_until(lambda: len(found) > 2 and "were dropped" in found[-2].getMessage())
    finally:
        logger.removeHandler(keeper)
    *arrived, said, last = found
    assert [record.number for record in (*arrived, last)] == [*range(len(arrived)), 0]  # type: ignore[attr-defined]
    assert said.getMessage().startswith(f"{400 - len(arrived)} log records of this worker were dropped")


def test_records_wait_again_for_a_client_that_has_begun_to_read(records: list[logging.LogRecord]) -> None:
    """None is dropped that there is room for in time, also after some were."""
    with Pool(1, log_level="INFO") as pool:
        pool.submit(helpers.square, 2).result(timeout=20)
        with pool._client.receiver.undisturbed:
            future = pool.submit(flood, "fdpool.test", 400, patience_s=0.2)
            wait_until(lambda: has_ended(pool), limit_s=60)
        future.result(timeout=20)
        pool.submit(flood, "fdpool.test", 2000, patience_s=20.0).result(timeout=60)
        wait_until(lambda: records and records[-1].number == 1999)  # type: ignore[attr-defined]
    assert [record.number for record in records[-2000:]] == list(range(2000))  # type: ignore[attr-defined]


def has_ended(pool: Pool) -> bool:
    """Whether the pool's one worker has begun a task and is in none; without receiving anything."""
    client = pool._client
    assert client.board is not None
    return client.board.begun(0) == client.newest and client.board.running(0) == (0, 0.0)


class _Slow(logging.Handler):
    """Takes its time for each record until it is `released`."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.numbers: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.released.wait(0.02)
        self.numbers.append(record.number)  # type: ignore[attr-defined]


@pytest.fixture
def slow_handler() -> Iterator[_Slow]:
    """Of the logger `fdpool.test`."""
    handler, logger = _Slow(), logging.getLogger("fdpool.test")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)


def test_a_handler_that_is_slower_than_workers_log_holds_up_no_deadline(slow_handler: _Slow) -> None:
    """P4: the thread that waits receives the records, so there is always one more to be told."""
    with Pool(2, log_level="INFO") as pool:
        late = pool.with_options(timeout=0.1, grace=0).submit(time.sleep, 1000)
        logs = pool.submit(log_numbers, "fdpool.test", 500)
        assert isinstance(late.exception(timeout=20), TaskTimeout)
        assert len(slow_handler.numbers) < 500
        slow_handler.released.set()
        logs.result(timeout=20)
    assert slow_handler.numbers == list(range(500))


def test_records_that_wait_for_a_slow_handler_have_a_bound_and_what_was_dropped_is_said(
    slow_handler: _Slow, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._news._MOST_BYTES", 50_000)
    with Pool(1, log_level="INFO") as pool:
        pool.submit(log_numbers, "fdpool.test", 500).result(timeout=20)
        assert len(slow_handler.numbers) < 500
        slow_handler.released.set()
    handled = slow_handler.numbers
    assert handled == sorted(set(handled))
    said = [
        record.getMessage() for record in caplog.records if "records of workers were dropped" in record.msg
    ]
    dropped = sum(int(text.split()[0]) for text in said)
    assert 0 < dropped < 500
    assert len(handled) + dropped == 500


class _Keeper(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def test_a_handler_that_wants_the_program_to_end_does_not_end_the_pools_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Exits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise SystemExit

    exits = Exits()
    logger = logging.getLogger("fdpool.test.exits")
    logger.addHandler(exits)
    logger.setLevel(logging.INFO)
    try:
        with Pool(1, log_level="INFO") as pool:
            pool.submit(log_numbers, logger.name, 1).result(timeout=20)
            wait_until(lambda: "could not be told" in caplog.text)
            assert pool.submit(helpers.square, 3).result(timeout=20) == 9
    finally:
        logger.removeHandler(exits)


@pytest.mark.usefixtures("raising_log")
def test_a_handler_that_raises_is_told_of_and_the_pool_goes_on() -> None:
    """What a callback raised, and that there is a new supervisor, is logged by the pool's own thread."""
    read, write = os.pipe()
    with Pool(1) as pool:
        with open(read, "rb") as file:
            waiting = pool.submit(helpers.read_all, file)
        waiting.add_done_callback(lambda _: 1 / 0)
        os.close(write)
        assert waiting.result(timeout=20) == b""
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9
        assert pool._client.control is not None
        os.kill(pool._client.control.pid, signal.SIGKILL)
        wait_until(lambda: pool.stats().supervisor_restarts == 1)
        assert pool.submit(helpers.square, 4).result(timeout=20) == 16
