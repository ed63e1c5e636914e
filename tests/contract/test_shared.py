"""Objects put into memory once, and memory files that are used again: nobody sees what is not meant for them."""

from __future__ import annotations

import gc
import os
import signal
import threading
from functools import partial
from typing import Any

import numpy
import pytest

import fdpool
from fdpool import Pool, Shared, _spill
from tests.process_state import wait_until

from . import helpers


@pytest.fixture
def pool() -> Any:
    with Pool(2) as pool:
        yield pool


def memory_files() -> int:
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            found += "fdpool-payload" in os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
    return found


# -- share -----------------------------------------------------------------------------------------


def test_a_shared_object_is_sealed_against_writing_whatever_was_sent_before(pool: Pool) -> None:
    array = numpy.ones(200_000)
    for _ in range(2):
        assert pool.submit(helpers.sum_of, {"array": array}).result() == 200_000
    assert _spill._kept
    with pool.share(array) as shared:
        with pytest.raises(PermissionError):
            os.pwrite(shared._fd, b"x", 0)


def test_a_task_takes_a_shared_object_as_if_it_were_that(pool: Pool) -> None:
    array = numpy.arange(100_000)
    with pool.share({"array": array, "name": "x"}) as shared:
        futures = [pool.submit(helpers.sum_of, shared) for _ in range(20)]
        assert [future.result() for future in futures] == [int(array.sum())] * 20
        assert list(pool.map(partial(helpers.nth_of, shared), range(100))) == list(range(100))


def test_a_worker_makes_a_shared_object_once() -> None:
    with Pool(1) as pool, pool.share([1, 2, 3]) as shared:
        first = pool.submit(id, shared).result()
        assert {pool.submit(id, shared).result() for _ in range(10)} == {first}


def test_its_buffers_are_read_only_and_one_memory_for_all_workers(pool: Pool) -> None:
    with pool.share(numpy.zeros(1 << 22)) as shared:
        with pytest.raises(ValueError, match="read-only"):
            pool.submit(helpers.write_first, shared).result()
        told = [pool.submit(helpers.inode_of_mapping, shared) for _ in range(10)]
        assert len({future.result() for future in told}) == 1


def test_small_arrays_are_read_only_too(pool: Pool) -> None:
    with pool.share([numpy.arange(3), numpy.arange(0)]) as few:
        error = pool.submit(helpers.change_first, few).exception()
    assert isinstance(error, ValueError)
    assert "read-only" in str(error)


def test_closing_the_handle_gives_the_memory_back(pool: Pool) -> None:
    before = memory_files()
    shared = pool.share(numpy.zeros(1 << 20))
    assert memory_files() == before + 1
    assert pool.submit(len, shared).result() == 1 << 20
    late = pool.submit(len, shared)
    shared.close()
    shared.close()
    assert shared.closed
    assert late.result() == 1 << 20
    assert memory_files() == before
    wait_until(lambda: not any(pool.submit(helpers.maps_shared_memory).result() for _ in range(8)))
    with pytest.raises(fdpool.DescriptorRefused, match="closed"):
        pool.submit(len, shared)


def test_a_dropped_handle_is_closed(pool: Pool) -> None:
    before = memory_files()
    pool.share([1])
    gc.collect()
    assert memory_files() == before


def test_it_lives_on_in_the_worker_that_replaces_a_dead_one(pool: Pool) -> None:
    with pool.share(numpy.arange(10)) as shared:
        for _ in range(3):
            with pytest.raises(fdpool.WorkerLost):
                pool.submit(helpers.die, signal.SIGKILL).result()
            assert pool.submit(helpers.sum_of, {"array": shared}).result() == 45


def test_what_cannot_be_shared_is_refused_and_nothing_stays_open(pool: Pool, tmp_path: Any) -> None:
    before = memory_files()
    with open(tmp_path / "file", "w") as file, pytest.raises(fdpool.DescriptorRefused):
        pool.share([file])
    with pytest.raises(fdpool.NotPicklable):
        pool.share(threading.Lock())
    with pool.share([1]) as shared:
        with pytest.raises(fdpool.DescriptorRefused):
            pool.share([shared])
        with pytest.raises(TypeError):
            import pickle

            pickle.dumps(shared)
    assert memory_files() == before
    assert isinstance(shared, Shared)


# -- memory files used again -------------------------------------------------------------------------


def test_a_memory_file_that_nobody_sees_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    acquire = _spill._acquire
    monkeypatch.setattr(_spill, "_acquire", lambda: made.append(1) or acquire())
    with Pool(1) as pool:
        for n in range(10):
            array = numpy.full(1 << 18, n)
            assert pool.submit(helpers.sum_of, {"array": array}).result() == n << 18
        assert len(made) == 1
    assert memory_files() == 0


@pytest.mark.parametrize("how", ["keep", "fork", "thread", "cycle"])
def test_an_array_that_a_task_has_kept_never_changes(how: str) -> None:
    with Pool(1) as pool:
        assert pool.submit(helpers.keep_array, numpy.full(1 << 18, 7), how).result() == 7
        for n in range(5):
            assert pool.submit(helpers.sum_of, {"array": numpy.full(1 << 18, n)}).result() == n << 18
        assert pool.submit(helpers.kept_array).result() == 7 << 18


def test_an_array_whose_call_loads_another_payload_never_changes() -> None:
    """That one's memory is mapped later, and let go of earlier; it must not be taken for the call's own."""
    with Pool(1) as pool:
        assert pool.submit(int, helpers.LoadsAnother(numpy.full(1 << 18, 7))).result() == 7
        for n in range(3):
            assert pool.submit(helpers.sum_of, {"array": numpy.full(1 << 18, n)}).result() == n << 18
        assert pool.submit(helpers.kept_array).result() == 7 << 18


def test_an_array_that_came_with_a_shared_object_never_changes() -> None:
    """That object's memory is mapped while the call is loaded, and must not be taken for the call's own."""
    with Pool(1) as pool, pool.share({"some": 1}) as shared:
        assert pool.submit(helpers.keep_first, numpy.full(1 << 18, 7), shared).result() == 7
        for n in range(3):
            assert pool.submit(helpers.sum_of, {"array": numpy.full(1 << 18, n)}).result() == n << 18
        assert pool.submit(helpers.kept_array).result() == 7 << 18


def test_a_shared_object_closed_before_its_last_task_is_let_go_of(pool: Pool) -> None:
    shared = pool.share(numpy.zeros(1 << 18))
    futures = [pool.submit(len, shared) for _ in range(40)]
    shared.close()
    assert {future.result() for future in futures} == {1 << 18}
    wait_until(lambda: not any(pool.submit(helpers.maps_shared_memory).result() for _ in range(8)))


def test_idle_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    recycle = _spill.recycle
    monkeypatch.setattr(_spill, "KEEP_S", 0.5)
    monkeypatch.setattr(_spill, "recycle", lambda *file: kept.append(recycle(*file)) or kept[-1])
    with Pool(1) as pool:
        pool.submit(len, bytes(1 << 20)).result()
        wait_until(lambda: kept == [True])
        wait_until(lambda: memory_files() == 0)


def test_a_forked_child_has_none_of_it() -> None:
    with Pool(1) as pool:
        pool.submit(len, bytes(1 << 20)).result()
        assert memory_files() == 1
        pid = os.fork()
        if pid == 0:
            os._exit(memory_files())
        assert os.waitpid(pid, 0)[1] == 0
