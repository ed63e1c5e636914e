"""`map`, with the semantics of Python 3.14."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import errno
import gc
import itertools
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fdpool import Pool
from fdpool._fixtures.pools import PoolFactory
from tests.process_state import wait_until

from . import helpers


@pytest.fixture
def pool(worker_pool_factory: PoolFactory) -> Pool:
    return worker_pool_factory(2)


@pytest.mark.parametrize("chunksize", [1, 2, 7, 1000])
@pytest.mark.parametrize("buffersize", [None, 1, 5])
def test_results_come_in_order(pool: Pool, chunksize: int, buffersize: int | None) -> None:
    results = pool.map(pow, range(50), itertools.repeat(2), chunksize=chunksize, buffersize=buffersize)
    assert list(results) == [n * n for n in range(50)]


def test_it_stops_at_the_shortest_iterable(pool: Pool) -> None:
    assert list(pool.map(pow, [1, 2, 3], [1, 2])) == [1, 4]
    assert list(pool.map(pow, [], [])) == []


def test_without_buffersize_everything_is_read_at_once(pool: Pool) -> None:
    source = iter(range(100))
    results = pool.map(helpers.square, source)
    assert list(source) == []
    assert list(results) == [n * n for n in range(100)]


def test_with_buffersize_items_are_read_as_results_are_taken(pool: Pool) -> None:
    source = itertools.count()
    results = pool.map(helpers.square, source, buffersize=4)
    assert next(source) == 4
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert next(source) == 8
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]


def test_an_exception_is_raised_where_its_result_would_be(pool: Pool) -> None:
    results = pool.map(divmod, [4, 4, 4], [2, 0, 1])
    assert next(results) == (2, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_result_that_comes_too_late_is_a_timeout(pool: Pool) -> None:
    pool.submit(helpers.square, 1).result()
    read, write = os.pipe()
    with open(write, "wb"), open(read, "rb") as gate, open(os.devnull, "rb") as null:
        results = pool.map(helpers.read_all, [null, gate], timeout=1.0)
        wait_until(lambda: pool.stats().unsettled == 1)  # what is there can be taken also after that time
        assert next(results) == b""
        with pytest.raises(cf.TimeoutError):  # the built-in one from Python 3.11 on
            next(results)


def test_an_iterator_that_is_closed_cancels_what_has_not_begun() -> None:
    with Pool(1) as pool:
        results = pool.map(helpers.spin, [0.05] * 400)
        next(results)
        begun = time.monotonic()
        results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 10


@contextlib.contextmanager
def busy_pool(folder: Path) -> Iterator[Pool]:
    """Its only worker does something else, as long as the block lasts."""
    gate = folder / "gate"
    os.mkfifo(gate)
    with Pool(1) as pool:
        busy = pool.submit(helpers.wait_at, str(gate))
        wait_until(Path(f"{gate}.begun").exists)
        try:
            yield pool
        finally:
            open(gate, "wb").close()
            busy.result()


@pytest.mark.parametrize("arguments", [{}, {"chunksize": 1}, {"chunksize": 2}, {"buffersize": 8}])
def test_an_iterator_that_is_closed_before_its_first_item_cancels_what_has_not_begun(
    arguments: Any, tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    noted.touch()
    with busy_pool(tmp_path) as pool:
        results = pool.map(partial(helpers.note, str(noted)), range(8), **arguments)
        results.close()  # type: ignore[attr-defined]
        assert list(results) == []
        assert pool.stats().unsettled == 1
    assert noted.read_text() == ""


@pytest.mark.parametrize("arguments", [{}, {"chunksize": 1}, {"chunksize": 2}, {"buffersize": 40}])
def test_iterables_that_raise_cancel_what_was_submitted_of_them(arguments: Any, tmp_path: Path) -> None:
    def items() -> Iterator[int]:
        yield from range(30)
        raise LookupError

    with busy_pool(tmp_path) as pool:
        with pytest.raises(LookupError):
            pool.map(abs, items(), **arguments)
        assert pool.stats().unsettled == 1


def test_chunks_that_cannot_be_submitted_cancel_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with busy_pool(tmp_path) as pool:
        submit, count = pool._client.submit, itertools.count()

        def without_memory(*arguments: Any) -> Any:
            if next(count) == 3:
                raise OSError(errno.ENOMEM, "no memory")
            return submit(*arguments)

        monkeypatch.setattr(pool._client, "submit", without_memory)
        with pytest.raises(OSError, match="no memory"):
            pool.map(abs, range(100))
        assert pool.stats().unsettled == 1


def test_a_subclass_with_a_submit_of_its_own_sees_every_item() -> None:
    seen: list[Any] = []

    class Traced(Pool):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            seen.append(args)
            return super().submit(fn, *args, **kwargs)

    with Traced(2) as pool:
        assert list(pool.map(helpers.square, range(30))) == [n * n for n in range(30)]
    assert seen == [(n,) for n in range(30)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"chunksize": 0}, ValueError),
        ({"chunksize": -1}, ValueError),
        ({"chunksize": 1.5}, TypeError),
        ({"chunksize": "1"}, TypeError),
        ({"buffersize": 0}, ValueError),
        ({"buffersize": -1}, ValueError),
        ({"buffersize": 1.5}, TypeError),
        ({"buffersize": "2"}, TypeError),
    ],
)
def test_sizes_that_make_no_sense_are_refused(pool: Pool, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        pool.map(helpers.square, [1], **arguments)


def test_an_unread_iterator_does_not_keep_the_pool() -> None:
    pool = Pool(1)
    results = pool.map(helpers.square, itertools.count(), buffersize=2)
    assert next(results) == 0
    pids = pool.worker_pids()
    assert pids
    del pool
    gc.collect()
    assert list(itertools.islice(results, 2)) == [1, 4]
    assert list(results) == []
