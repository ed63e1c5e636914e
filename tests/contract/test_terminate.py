"""`terminate()` of a future ends a task wherever it is, and nothing else; so does a cancelled await."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Pool
from fdpool._control import ControlLink
from tests.contract import helpers
from tests.process_state import seconds_until_gone, wait_until


def test_an_exception_ends_a_task_and_its_worker_lives(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        future = pool.submit(helpers.note_and_sleep, str(noted))
        wait_until(lambda: noted.exists() and noted.read_text())
        assert future.terminate(grace=30)
        with pytest.raises(CancelledError):
            future.result(timeout=20)
        assert future.cancelled()
        assert pool.submit(os.getpid).result(timeout=20) == int(noted.read_text())


def test_a_task_that_is_just_about_to_begin_costs_no_worker() -> None:
    """It counts as running from the moment that its worker has it; the signal may come before its first line."""
    read, write = os.pipe()
    os.close(write)
    with Pool(1) as pool, open(read) as empty:
        pool.submit(helpers.square, 2).result(timeout=20)
        for _ in range(40):
            future = pool.submit(helpers.spin_with, 60.0, empty)
            wait_until(lambda future=future: future.running())  # type: ignore[misc]
            assert future.terminate(grace=30)
            with pytest.raises(CancelledError):
                future.result(timeout=20)
        assert pool.stats().lost_workers == 0
        assert pool.submit(helpers.open_numbers).result(timeout=20).keys() <= set(range(20))


class _Deaf:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __del__(self) -> None:
        self._path.touch()
        time.sleep(30)  # what a signal's handler raises in a finalizer is dropped


def _load_deaf(path: Path) -> None:
    sys.unraisablehook = lambda _: None
    _Deaf(path)


class _Unloads:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_deaf, (self._path,)


def test_an_interrupt_that_a_finalizer_drops_while_the_call_is_loaded_is_heeded_then(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    with Pool(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        future = pool.submit(helpers.spin_with, 60.0, _Unloads(deaf))
        wait_until(deaf.exists)
        assert future.terminate(grace=30)
        with pytest.raises(CancelledError):
            future.result(timeout=20)
        assert pool.submit(os.getpid).result(timeout=20) == pid


def test_a_task_is_interrupted_again_as_the_first_signal_may_be_lost(tmp_path: Path) -> None:
    """As it is if it comes just before a system call that blocks."""
    noted = tmp_path / "noted"
    read, write = os.pipe()
    with open(write, "wb"), Pool(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        with open(read, "rb") as gate:
            future = pool.submit(helpers.hear_only_the_second, noted, gate)
        wait_until(noted.exists)
        assert future.terminate(grace=60)
        with pytest.raises(CancelledError):
            future.result(timeout=20)
        assert pool.submit(os.getpid).result(timeout=20) == pid
        assert pool.stats().lost_workers == 0


def test_a_task_that_cannot_be_interrupted_goes_with_its_worker(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        future = pool.submit(helpers.note_and_hang, str(noted))
        behind = [pool.submit(helpers.square, n) for n in range(10)]
        wait_until(lambda: noted.exists() and noted.read_text())
        worker = psutil.Process(int(noted.read_text()))
        assert future.terminate(grace=0.1)
        assert wait([future], timeout=20).done
        assert future.cancelled()
        seconds_until_gone([worker])
        assert [each.result(timeout=20) for each in behind] == [n * n for n in range(10)]


def test_a_second_call_can_only_make_it_sooner(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        future = pool.submit(helpers.note_and_hang, str(noted))
        wait_until(lambda: noted.exists() and noted.read_text())
        assert future.terminate(grace=600)
        assert future.terminate(grace=0)
        assert future.terminate(grace=600)
        assert wait([future], timeout=20).done
        assert future.cancelled()


@pytest.mark.parametrize("grace", [None, "1", -1, float("nan")])
def test_a_grace_of_no_use_is_refused_and_harms_nothing(grace: Any, tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        future = pool.submit(helpers.note_and_sleep, str(noted))
        wait_until(lambda: noted.exists() and noted.read_text())
        with pytest.raises((TypeError, ValueError), match="grace must be a"):
            future.terminate(grace)
        assert future.running()
        assert future.terminate(0)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_what_a_task_returns_nevertheless_is_its_result(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        future = pool.submit(helpers.clean_up, str(noted))
        wait_until(lambda: noted.exists() and noted.read_text())
        assert future.terminate(grace=30)
        assert future.result(timeout=20) == "cleaned up"


def test_a_task_that_has_not_begun_is_cancelled_at_once(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with Pool(1) as pool:
        running = pool.submit(helpers.note_and_sleep, str(noted))
        wait_until(lambda: noted.exists() and noted.read_text())
        queued = [pool.submit(helpers.square, n) for n in range(40)]
        assert all(future.terminate() for future in queued)
        assert all(future.cancelled() for future in queued)
        assert not running.done()
        running.terminate()


def test_a_task_that_has_ended_is_left_alone() -> None:
    with Pool(1) as pool:
        future = pool.submit(helpers.square, 3)
        assert future.result(timeout=20) == 9
        assert not future.terminate()
        assert future.result() == 9


def test_a_program_is_ended_too(tmp_path: Path) -> None:
    with Pool(1) as pool:
        future = pool.run(["sleep", "1000"])
        wait_until(future.running)
        assert future.terminate()
        assert future.cancelled()


@pytest.mark.timeout(30)
def test_a_program_is_ended_whose_worker_has_yet_to_be_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    receive = ControlLink.try_receive
    monkeypatch.setattr(ControlLink, "try_receive", lambda link: receive(link) if go_on.is_set() else None)
    with Pool(1) as pool:
        future = pool.run(["sh", "-c", f"echo > {tmp_path}/begun; exec sleep 1000"])
        wait_until((tmp_path / "begun").exists)
        wait_until(future.running)
        assert future.terminate()
        go_on.set()


def test_who_waits_by_other_means_learns_of_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    called: list[bool] = []
    with Pool(1) as pool:
        future = pool.submit(helpers.note_and_sleep, str(noted))
        future.add_done_callback(lambda done: called.append(done.cancelled()))
        wait_until(lambda: noted.exists() and noted.read_text())
        future.terminate()
        assert list(as_completed([future], timeout=20)) == [future]
        wait_until(lambda: called == [True])


def test_a_future_can_be_awaited() -> None:
    async def main() -> int:
        with Pool(2) as pool:
            results = await asyncio.gather(*(pool.submit(helpers.square, n) for n in range(5)))
            return sum(results)

    assert asyncio.run(main()) == 30


def test_an_awaited_task_that_raises_stop_iteration_fails() -> None:
    """asyncio's own futures take no such exception, and before Python 3.12.2 nobody tells who waits for them."""

    async def main(pool: Pool) -> None:
        await asyncio.wait_for(pool.submit(next, iter(())), 30)

    with Pool(1) as pool:
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            asyncio.run(main(pool))
        assert isinstance(caught.value.__cause__, StopIteration)


def test_a_future_whose_awaiting_loop_was_closed_says_nothing_of_that(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def begin_to_wait(future: Any) -> None:
        future.__await__().send(None)

    with Pool(1) as pool:
        pool.submit(helpers.wait_at, str(gate))
        future = pool.submit(helpers.square, 3)
        asyncio.run(begin_to_wait(future))
        gate.open("wb").close()
    assert future.result() == 9
    assert not caplog.records


def test_a_cancelled_await_ends_the_task(tmp_path: Path) -> None:
    noted = tmp_path / "pid"

    async def main(pool: Pool) -> psutil.Process:
        async def awaiting() -> None:
            await pool.submit(helpers.note_and_hang, str(noted))

        task = asyncio.create_task(awaiting())
        await asyncio.to_thread(wait_until, lambda: noted.exists() and noted.read_text())
        worker = psutil.Process(int(noted.read_text()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return worker

    with Pool(1) as pool:
        worker = asyncio.run(main(pool))
        seconds_until_gone([worker])


def test_terminate_storms_lose_nothing_else(tmp_path: Path) -> None:
    """Tasks that are terminated at every moment of their short lives; their neighbours all come back."""
    with Pool(2) as pool:
        for _ in range(60):
            doomed = [pool.submit(helpers.spin, 0.001) for _ in range(3)]
            sound = [pool.submit(helpers.square, n) for n in range(20)]
            for future in doomed:
                future.terminate(grace=0.0)
            assert [future.result(timeout=20) for future in sound] == [n * n for n in range(20)]
            for future in doomed:
                try:
                    future.result(timeout=20)
                except CancelledError:
                    pass


def test_a_task_that_a_worker_has_received_and_not_begun_is_ended_too(tmp_path: Path) -> None:
    """It carries a descriptor, so nobody can fetch it back, and its worker has not come to it yet."""
    noted = tmp_path / "noted"
    noted.touch()
    with Pool(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        with open(os.devnull) as null:
            worker = psutil.Process(pid)
            worker.suspend()  # which looks as if it took its time
            try:
                future = pool.submit(helpers.note_at_last, null, str(noted))
                assert future.terminate(grace=0.1)
            finally:
                worker.resume()
        wait([future], timeout=20)
        assert future.cancelled()
    assert noted.read_text() == ""
