"""What `with_options` allows a task: time, waiting, memory, attempts. Rows P4, P10 and W5 of the hazards."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

import fdpool
from fdpool import (
    MemoryLimitExceeded,
    PoisonTask,
    Pool,
    PoolBroken,
    PoolShutDown,
    TaskTimeout,
    WorkerLost,
    wire,
)
from fdpool._board import Board, Page
from fdpool._links import SlotLink
from fdpool._options import TaskOptions, changed
from tests.contract import helpers
from tests.process_state import seconds_until_gone, wait_until

MIB = 1 << 20


def pids(ledger: Path) -> list[int]:
    return [int(line) for line in ledger.read_text().split()]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    path.touch()
    return path


def test_a_task_that_takes_too_long_fails_with_the_stacks_of_its_worker(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._limits._OVERDUE_S", 60.0)
    with Pool(1) as pool:
        pool.submit(helpers.nothing).result(timeout=20)  # what the task would have to import first
        began = time.monotonic()
        with pytest.raises(TaskTimeout, match=r"stuck had run for 1\.5 seconds") as caught:
            pool.with_options(timeout=1.5).submit(helpers.stuck, str(ledger)).result(timeout=20)
        assert 1.5 <= time.monotonic() - began < 20
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.timeout == 1.5
    assert error.may_have_run
    assert "in stuck" in error.stacks
    assert "_worker.py" not in error.stacks
    assert error.stacks.splitlines()[-1].strip() in str(error)


def test_other_tasks_feel_nothing_of_one_that_takes_too_long(ledger: Path) -> None:
    """Neither those of other workers nor those that were given to the same one."""
    with Pool(1) as pool:
        late = pool.with_options(timeout=0.2).submit(helpers.stuck, str(ledger))
        read, write = os.pipe()
        with open(read) as reading:
            os.write(write, b"handed over")
            os.close(write)
            behind = [pool.submit(helpers.square, n) for n in range(40)]
            carrying = pool.submit(helpers.read_all, reading)
        assert [future.result(timeout=20) for future in behind] == [n * n for n in range(40)]
        assert carrying.result(timeout=20) == "handed over"
        assert isinstance(late.exception(), TaskTimeout)


def test_the_time_counts_from_the_start_and_not_from_submit(tmp_path: Path) -> None:
    """Neither from that of the task before it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with Pool(1) as pool:
        before = pool.submit(helpers.wait_at, str(gate))
        wait_until(before.running)
        behind = [pool.with_options(timeout=2).submit(helpers.square, n) for n in range(8)]
        late = time.monotonic() + 2.2
        wait_until(lambda: time.monotonic() > late)
        gate.open("wb").close()
        assert [future.result(timeout=20) for future in behind] == [n * n for n in range(8)]


def test_what_descends_from_a_task_ends_with_it(ledger: Path) -> None:
    def grandparent() -> None:
        import subprocess

        command = f"sh -c 'trap \"\" TERM; echo $$ >> {ledger}; while :; do sleep 0.1; done' & wait"
        subprocess.run(command, check=False, shell=True, start_new_session=True)

    with Pool(1) as pool:
        future = pool.with_options(timeout=5, grace=0.1).submit(grandparent)  # it has begun by then
        wait_until(lambda: pids(ledger))
        [process] = [psutil.Process(pid) for pid in pids(ledger)]
        assert isinstance(future.exception(timeout=20), TaskTimeout)
        seconds_until_gone([process])


def test_a_task_that_ignores_sigterm_has_its_grace_and_no_more(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._limits._OVERDUE_S", 60.0)
    with Pool(1, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_IGN)) as pool:
        pool.submit(helpers.nothing).result(timeout=20)
        began = time.monotonic()
        future = pool.with_options(timeout=0.2, grace=0.3).submit(helpers.stuck, str(ledger))
        assert isinstance(future.exception(timeout=20), TaskTimeout)
        assert 0.5 <= time.monotonic() - began < 20


def test_a_worker_that_is_stopped_is_replaced_when_its_tasks_time_is_up() -> None:
    """W5: nothing is heard of it, and it cannot write its stacks."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)

    with Pool(1) as pool:
        future = pool.with_options(timeout=0.5, grace=0.2).submit(stop)
        assert isinstance(future.exception(timeout=20), TaskTimeout)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_a_task_that_has_not_begun_in_time_never_runs(ledger: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with Pool(1) as pool:
        running = pool.submit(helpers.wait_at, str(gate))
        wait_until(running.running)
        late = pool.with_options(queue_timeout=0.1).submit(helpers.stuck, str(ledger))
        with pytest.raises(TaskTimeout, match="had not begun 0.1 seconds") as caught:
            late.result(timeout=20)
        assert caught.value.may_have_run is False
        gate.open("wb").close()
        running.result(timeout=20)
        in_time = pool.with_options(queue_timeout=60).submit(helpers.square, 4)
        assert in_time.result(timeout=20) == 16
    assert not pids(ledger)


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_task_whose_worker_hangs_as_it_begins_waits_no_longer_than_it_may(
    start_method: Literal["forkserver", "fork"], tmp_path: Path
) -> None:
    """W6: a pool gives its workers any time for that, and `timeout` counts from a task's start."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    held = threading.Lock()
    held.acquire()
    hang = partial(helpers.wait_at, str(gate)) if start_method == "forkserver" else held.acquire
    with Pool(1, initializer=hang, start_method=start_method) as pool:
        endless = pool.with_options(timeout=0.001).submit(helpers.square, 2)
        with pytest.raises(TaskTimeout, match="had not begun 0.2 seconds") as caught:
            pool.with_options(queue_timeout=0.2).submit(helpers.square, 3).result(timeout=20)
        assert caught.value.may_have_run is False
        assert not endless.done()
        if start_method == "forkserver":  # no thread is left there that could release the other's lock
            with gate.open("wb"):
                # For the next worker as well: the task may take longer than it may, on a busy machine.
                (tmp_path / "open").touch()
                os.replace(tmp_path / "open", gate)
            assert endless.exception(timeout=20) is None or isinstance(endless.exception(), TaskTimeout)
            assert pool.submit(helpers.square, 4).result(timeout=20) == 16
        else:
            pool.kill_workers()
            with pytest.raises(CancelledError):
                endless.result(timeout=20)


def test_a_task_that_takes_too_much_memory_is_ended() -> None:
    def hoard() -> None:
        kept = bytearray(400 * MIB)
        time.sleep(1000)
        del kept

    with Pool(1) as pool:
        view = pool.with_options(max_memory=200 * MIB)
        assert view.submit(helpers.square, 3).result(timeout=20) == 9
        with pytest.raises(MemoryLimitExceeded, match="max_memory is 209,715,200") as caught:
            view.submit(hoard).result(timeout=20)
        assert isinstance(caught.value, MemoryError)
        assert caught.value.used > caught.value.limit == 200 * MIB
        hopeless = view.with_options(retries=1, retry_delay=0).submit(hoard).exception(timeout=20)
        assert isinstance(hopeless, MemoryLimitExceeded)
        assert [type(attempt) for attempt in hopeless.attempts] == [MemoryLimitExceeded]
        assert pool.submit(helpers.square, 4).result(timeout=20) == 16


def test_a_task_is_tried_again_as_often_as_it_may(ledger: Path) -> None:
    with Pool(2) as pool:
        view = pool.with_options(retries=3, retry_delay=0.01)
        assert view.submit(helpers.count_and_die_before, str(ledger), 3).result(timeout=20) == 3


@pytest.mark.parametrize("cause", ["code 3", "SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_task_that_kills_every_worker_is_poison(cause: str, ledger: Path) -> None:
    """P4"""
    with Pool(2) as pool:
        view = pool.with_options(retries=2, retry_delay=0.01, name="the killer")
        with pytest.raises(PoisonTask, match="ran the killer.*in the last of 3 attempts") as caught:
            view.submit(helpers.count_and_die_of, str(ledger), cause).result(timeout=20)
        assert [type(attempt) for attempt in caught.value.attempts] == [WorkerLost, WorkerLost]
        assert all(cause in str(error) for error in [*caught.value.attempts, caught.value])
        assert ledger.read_text() == "xxx"
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


@pytest.mark.parametrize(
    "error", [ValueError("its own"), MemoryError("its own")], ids=lambda each: type(each).__name__
)
def test_what_a_task_raises_is_not_tried_again(error: Exception, ledger: Path) -> None:
    """P4: and costs no worker, though there was no memory for it."""

    def fail() -> None:
        with open(ledger, "a") as file:
            file.write("x")
        raise error

    with Pool(1) as pool:
        with pytest.raises(type(error), match="its own"):
            pool.with_options(retries=5).submit(fail).result(timeout=20)
        assert pool.stats().lost_workers == 0
    assert ledger.read_text() == "x"


def test_a_task_that_timed_out_is_tried_again(ledger: Path) -> None:
    def begin() -> None:
        with open(ledger, "a") as file:
            file.write("x")

    def lucky_in_a_second_worker() -> str:
        if os.stat(ledger).st_size == 1:
            time.sleep(1000)
        return "done"

    with Pool(1, initializer=begin) as pool:
        view = pool.with_options(timeout=0.3, retry_delay=0)
        lucky = view.with_options(retries=9).submit(lucky_in_a_second_worker)  # it may be slow again
        assert lucky.result(timeout=20) == "done"
        assert os.stat(ledger).st_size >= 2
        hopeless = view.with_options(retries=1).submit(time.sleep, 1000).exception(timeout=20)
        assert isinstance(hopeless, TaskTimeout)
        assert [type(attempt) for attempt in hopeless.attempts] == [TaskTimeout]


def test_a_task_that_is_terminated_in_the_grace_of_its_timeout_is_not_tried_again(ledger: Path) -> None:
    def stubborn() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
        helpers.stuck(str(ledger))

    with Pool(1, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_IGN)) as pool:
        view = pool.with_options(timeout=0.2, grace=60, retries=1, retry_delay=0)
        future = view.submit(stubborn)
        wait_until(lambda: future.cut_short is not None and pids(ledger))
        assert future.terminate(grace=0)
        with pytest.raises(CancelledError):
            future.result(timeout=20)
    assert len(pids(ledger)) == 1


def test_descriptors_are_there_again_for_the_next_attempt(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def read_or_die(file: Any) -> str:
        if not marker.exists():
            marker.touch()
            os._exit(1)
        content: str = file.read()
        return content

    path = tmp_path / "file"
    path.write_text("content")
    with Pool(1) as pool, path.open() as file:
        assert pool.with_options(retries=1).submit(read_or_die, file).result(timeout=20) == "content"


@pytest.mark.parametrize(
    ("changes", "delays"),
    [
        ({}, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]),
        ({"retry_delay": 5}, [5, 10, 20, 30, 30]),
        ({"retry_delay": 100}, [100, 100, 100]),  # as long as it was told, but no longer
        ({"retry_delay": 0}, [0, 0, 0]),
    ],
)
def test_each_further_attempt_waits_twice_as_long_and_thirty_seconds_at_most(
    changes: dict[str, float], delays: list[float]
) -> None:
    options = changed(None, changes)
    assert [options.delay_s(attempts) for attempts in range(1, len(delays) + 1)] == pytest.approx(delays)
    assert options.delay_s(1_000_000) == delays[-1]


def test_a_task_is_postponed_for_longer_after_each_attempt(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TaskOptions, "delay_s", lambda _, attempts: [asked.append(attempts), 0.0][1])
    with Pool(1) as pool:
        view = pool.with_options(retries=3)
        assert view.submit(helpers.count_and_die_before, str(ledger), 4).result(timeout=20)
    assert asked == [1, 2, 3]


def test_a_task_that_waits_for_its_next_attempt_can_be_cancelled(ledger: Path) -> None:
    with Pool(1) as pool:
        view = pool.with_options(retries=5, retry_delay=30)
        future = view.submit(helpers.count_and_die_before, str(ledger), 100)
        wait_until(lambda: pool._client.dispatcher.postponed_until)
        assert future.cancel()


def test_a_view_is_an_executor_of_its_own_on_the_same_workers(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with Pool(2) as pool:
        other = pool.submit(helpers.wait_at, str(gate))
        with pool.with_options(timeout=60, name="viewed") as view:
            assert list(view.map(helpers.square, range(5))) == [0, 1, 4, 9, 16]
            assert view.run(["true"]).result(timeout=20).returncode == 0
            mine = view.submit(helpers.spin, 0.05)
            assert view.with_options(retries=1)._options.timeout == 60  # type: ignore[union-attr]
        assert mine.done()
        assert not other.done()
        with pytest.raises(fdpool.PoolShutDown, match="view"):
            view.submit(helpers.square, 3)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9
        gate.open("wb").close()
        other.result(timeout=20)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": math.nan}, ValueError),
        ({"timeout": math.inf}, ValueError),
        ({"timeout": 10**400}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"timeout": True}, TypeError),
        ({"queue_timeout": 0}, ValueError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.5}, TypeError),
        ({"retry_delay": -0.1}, ValueError),
        ({"max_memory": 0}, ValueError),
        ({"grace": math.inf}, ValueError),
        ({"name": 3}, TypeError),
    ],
)
def test_an_option_of_no_use_is_refused_at_once(option: dict[str, Any], error: type[Exception]) -> None:
    """P10"""
    pool = Pool(1)
    with pytest.raises(error, match=next(iter(option))):
        pool.with_options(**option)
    pool.shutdown()


@pytest.mark.parametrize("size", [1000, 100_000, 32 * MIB], ids=["small", "large", "spilled"])
@pytest.mark.parametrize("timeout", [1e-6, 0.001])
def test_a_time_that_is_shorter_than_sending_takes_is_up_and_the_pool_goes_on(
    timeout: float, size: int
) -> None:
    """P10: whether it has begun by then or not."""
    with Pool(1) as pool:
        late = pool.with_options(timeout=timeout, grace=0).submit(helpers.sleep_on, bytes(size))
        behind = [pool.submit(helpers.square, n) for n in range(3)]
        with pytest.raises(TaskTimeout, match=f"{timeout:g} seconds"):
            late.result(timeout=20)
        assert [future.result(timeout=20) for future in behind] == [0, 1, 4]
        # It may begin at once, however soon that has to be.
        too_late = pool.with_options(queue_timeout=timeout).submit(len, bytes(size))
        error = too_late.exception(timeout=20)
        assert error is None or (isinstance(error, TaskTimeout) and not error.may_have_run)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_limits_cost_an_idle_pool_nothing() -> None:
    with Pool(1) as pool:
        pool.with_options(timeout=60, max_memory=1 << 40).submit(helpers.square, 3).result(timeout=20)
        wait_until(lambda: pool._client.limits.next_look() is None)


def test_a_limit_may_be_longer_than_the_kernel_can_be_asked_to_wait() -> None:
    """As epoll_wait(2) counts milliseconds in an int: 24 days."""
    with Pool(1, max_age=3e6, idle_timeout=3e7) as pool:
        view = pool.with_options(timeout=3e6, queue_timeout=3e6, grace=3e6)
        assert view.submit(helpers.spin, 0.2).result(timeout=3e6)
        assert view.submit(helpers.square, 3).result(timeout=20) == 9


def test_many_tasks_with_waiting_times_of_their_own_do_not_hurt_the_pool() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that the pool's thread looks at them in the midst of a submit
    try:
        with Pool(1) as pool:
            futures = [
                pool.with_options(queue_timeout=100 + n).submit(helpers.square, n) for n in range(1500)
            ]
            assert [future.result(timeout=60) for future in futures] == [n * n for n in range(1500)]
    finally:
        sys.setswitchinterval(before)


def test_nothing_is_kept_of_tasks_that_are_done_behind_one_that_is_not(ledger: Path) -> None:
    """P13."""
    with Pool(2) as pool:
        view = pool.with_options(queue_timeout=1000)
        running = view.submit(helpers.stuck, str(ledger))
        try:
            for future in [view.submit(helpers.square, n) for n in range(500)]:
                future.result(timeout=20)
            view.submit(helpers.square, 3).result(timeout=20)
            assert len(pool._client.limits._waiting) < 200
        finally:
            running.terminate(grace=0)


def test_a_next_attempt_is_not_taken_for_the_one_that_was_ended(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_first_too_long(path: str) -> str:
        with open(path, "a") as file:
            file.write("x")
        time.sleep(1000 if os.stat(path).st_size == 1 else 1.0)
        return "done"

    monkeypatch.setattr("fdpool._limits._OVERDUE_S", 0.5)  # it is killed by force that long after
    with Pool(1) as pool:
        view = pool.with_options(timeout=4, grace=0, retries=1, retry_delay=0)
        assert view.submit(at_first_too_long, str(ledger)).result(timeout=20) == "done"


def test_a_worker_that_the_client_has_to_kill_itself_is_not_put_down_to_anybody_else(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W3, W5: the supervisor stands still, and finds a worker dead that it was not told to end."""
    monkeypatch.setattr("fdpool._limits._OVERDUE_S", 0.1)
    hangs = ledger.with_name("hangs")
    with Pool(2) as pool:
        ended = pool.submit(helpers.note_and_hang, str(hangs))
        wait_until(lambda: hangs.exists() and pids(hangs))
        late = pool.with_options(timeout=5, grace=0).submit(helpers.stuck, str(ledger))
        wait_until(lambda: len(pids(ledger)) == 1)
        wait_until(lambda: len(pool.worker_pids()) == 2)
        workers = [psutil.Process(pid) for pid in pool.worker_pids()]
        [supervisor] = {worker.ppid() for worker in workers}
        os.kill(supervisor, signal.SIGSTOP)
        try:
            assert ended.terminate(grace=0)
            seconds_until_gone(workers)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        error = late.exception(timeout=20)
        assert isinstance(error, TaskTimeout)
        assert "by the pool" not in str(error)
        with pytest.raises(CancelledError):
            ended.result(timeout=20)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With supervisors that do not end a worker, or report its death."""
    monkeypatch.setattr("fdpool._limits._OVERDUE_S", 0.1)
    monkeypatch.setattr("fdpool._limits._SILENT_LOOK_S", 0.02)


@contextlib.contextmanager
def stopped_supervisor(pool: Pool) -> Iterator[None]:
    """It stands still, and is not let go on before the end."""
    assert pool._client.control is not None
    supervisor = psutil.Process(pool._client.control.pid)
    supervisor.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.resume()


@pytest.mark.usefixtures("little_patience")
def test_no_deadline_waits_for_a_supervisor_that_stands_still(ledger: Path) -> None:
    """W4: it never reports the death of the worker that the client has killed itself."""
    with Pool(1) as pool:
        late = pool.with_options(timeout=0.4, grace=0).submit(helpers.stuck, str(ledger))
        wait_until(lambda: pids(ledger))
        with stopped_supervisor(pool):
            assert isinstance(late.exception(timeout=20), TaskTimeout)
            assert pool.submit(helpers.square, 3).result(timeout=20) == 9


@pytest.mark.usefixtures("little_patience")
def test_a_supervisor_that_stands_still_is_given_up_for_a_task_that_is_to_end(
    ledger: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W4: a new one takes its place, what ran is lost, and may be tried again."""
    again, other = ledger.with_name("again"), ledger.with_name("other")
    again.touch()
    other.touch()

    def at_first_stuck() -> int:
        with again.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1000 if len(pids(again)) == 1 else 0)
        return len(pids(again))

    with Pool(3) as pool:
        ended = pool.submit(helpers.note_and_hang, str(ledger))
        lost = pool.submit(helpers.stuck, str(other))
        retried = pool.with_options(retries=1, retry_delay=0).submit(at_first_stuck)
        wait_until(lambda: all(map(pids, (ledger, other, again))))
        with stopped_supervisor(pool):
            assert ended.terminate(grace=0)
            with pytest.raises(CancelledError):
                ended.result(timeout=20)
            with pytest.raises(WorkerLost, match="had not reported the death of worker"):
                lost.result(timeout=20)
            assert retried.result(timeout=20) == 2
            assert pool.stats().supervisor_restarts == 1
    assert "was killed by the pool, as it had not reported the death of worker" in caplog.text


@pytest.mark.usefixtures("little_patience")
def test_a_task_is_ended_where_the_supervisor_stands_still_and_cannot_be_replaced(ledger: Path) -> None:
    """W4: it was a fork of this process. The pool breaks, and says why."""
    with Pool(2, start_method="fork") as pool:
        hanging = pool.submit(helpers.note_and_hang, str(ledger))
        other = pool.submit(helpers.note_and_hang, str(ledger.with_name("other")))
        wait_until(lambda: pids(ledger) and ledger.with_name("other").exists())
        with stopped_supervisor(pool):
            assert hanging.terminate(grace=0)
            with pytest.raises(PoolBroken, match="had not reported the death of worker"):
                hanging.result(timeout=20)
            assert isinstance(other.exception(timeout=20), PoolBroken)


def test_callbacks_that_are_slower_than_tasks_hold_up_no_deadline() -> None:
    """P4: the thread that waits settles futures, so there is always one more to call back."""
    released = threading.Event()
    called: list[int] = []

    def call_back(future: Future[int]) -> None:
        released.wait(0.02)
        called.append(future.result())

    with Pool(2) as pool:
        late = pool.with_options(timeout=0.1, grace=0).submit(time.sleep, 1000)
        for n in range(500):
            pool.submit(helpers.square, n).add_done_callback(call_back)
        assert isinstance(late.exception(timeout=20), TaskTimeout)
        assert len(called) < 500
        released.set()
    assert sorted(called) == [n * n for n in range(500)]


def test_results_that_load_more_slowly_than_tasks_end_hold_up_no_deadline() -> None:
    """P4: the thread that waits takes answers, so there is always one more to load."""
    helpers.SlowToLoad.released.clear()
    with Pool(2) as pool:
        late = pool.with_options(timeout=0.1, grace=0).submit(time.sleep, 1000)
        futures = [pool.submit(helpers.SlowToLoad) for _ in range(500)]
        waiting = threading.Thread(target=futures[-1].result)
        waiting.start()
        wait_until(lambda: pool.stats().lost_workers)
        assert not futures[-1].done()
        helpers.SlowToLoad.released.set()
        waiting.join(20)
        assert isinstance(late.exception(timeout=20), TaskTimeout)
        for future in futures:
            assert isinstance(future.result(timeout=20), helpers.SlowToLoad)


def test_a_next_attempt_is_not_overdue_while_its_worker_is_still_to_start(ledger: Path) -> None:
    """The slot's last worker has died of the same task, which it had begun long ago."""
    with Pool(1, preload=["tests.contract.helpers"]) as pool:
        view = pool.with_options(timeout=2, retries=1, retry_delay=3)
        future = view.submit(helpers.count_and_die_before, str(ledger), 2)
        wait_until(lambda: pool.stats().postponed)
        assert pool._client.control is not None
        supervisor = psutil.Process(pool._client.control.pid)
        supervisor.suspend()
        try:
            wait_until(lambda: [worker.state for worker in pool.stats().workers] == ["starting"])
            looked = time.monotonic() + 2.2
            wait_until(lambda: time.monotonic() > looked)
        finally:
            supervisor.resume()
        assert future.result(timeout=20) == 2
        assert [worker.generation for worker in pool.stats().workers] == [2]


def test_a_task_that_is_tried_again_has_begun_in_time(ledger: Path) -> None:
    with Pool(1) as pool:
        view = pool.with_options(queue_timeout=1000, retries=1, retry_delay=2)
        future = view.submit(helpers.count_and_die_before, str(ledger), 2)
        wait_until(lambda: pool.stats().postponed)
        # As if these 1000 seconds were over.
        pool._client.critical.post(pool._client.limits._give_up_waiting, future._task, 1000.0)
        assert future.result(timeout=20) == 2


def test_a_program_that_was_cancelled_is_not_tried_again(ledger: Path) -> None:
    with Pool(1) as pool:
        script = f"trap '' TERM; echo $$ >> {ledger}; while :; do sleep 0.1; done"
        future = pool.with_options(retries=1, retry_delay=0).run(["sh", "-c", script], grace=60)
        wait_until(lambda: pids(ledger))
        assert future.cancel()
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
    assert len(pids(ledger)) == 1


def room_for_descriptors(monkeypatch: pytest.MonkeyPatch, answers: Iterable[bool]) -> Iterator[bool]:
    """Whether the client finds room for what it next takes out of an inbox, and so on; afterwards it always does."""
    left = iter(answers)
    try_take = wire.try_take

    def take(*arguments: Any) -> wire.Received | None:
        if next(left, True):
            return try_take(*arguments)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(wire, "try_take", take)
    return left


def test_nothing_behind_a_late_task_is_lost_or_run_twice_where_descriptors_are_short(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker's inbox cannot be emptied then: the kernel would drop what is in there."""
    answers = room_for_descriptors(monkeypatch, [False] * 2)
    gate = ledger.with_name("gate")
    os.mkfifo(gate)
    with Pool(1) as pool, open(os.devnull) as null:
        noted = ledger.with_name("noted")
        noted.touch()
        before = pool.submit(helpers.wait_at, str(gate))  # so all are there before the late one begins
        wait_until(before.running)
        late = pool.with_options(timeout=0.3, grace=0).submit(helpers.stuck, str(ledger))
        behind = [pool.submit(helpers.note, str(noted), 1), pool.submit(helpers.read_all, null)]
        behind.append(pool.submit(helpers.note, str(noted), 2))
        gate.open("wb").close()
        for future in behind:
            future.result(timeout=20)
        assert isinstance(late.exception(timeout=20), TaskTimeout)
    assert next(answers, None) is None
    assert sorted(noted.read_text().split()) == ["1", "2"]


def test_a_late_task_that_ends_in_its_grace_takes_nobody_with_it_where_descriptors_are_short(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind it cannot be taken away, and its worker is being ended: so that must receive nothing more."""
    room_for_descriptors(monkeypatch, itertools.repeat(False))
    blocked = (signal.SIG_BLOCK, [signal.SIGTERM])
    # From the start: it may come before the task has got so far.
    with Pool(1, initializer=signal.pthread_sigmask, initargs=blocked) as pool, open(os.devnull) as null:
        late = pool.with_options(timeout=0.3, grace=1000).submit(helpers.end_when_told, str(ledger))
        behind = [pool.submit(helpers.pid_with, null) for _ in range(3)]
        assert late.exception(timeout=20) is None
        [successor] = {future.result(timeout=20) for future in behind}
        assert successor not in pids(ledger)
        assert pool.stats().lost_workers == 0


def test_so_does_one_that_travels_with_others(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker returns these, and must not take the next message for one that it may receive."""
    room_for_descriptors(monkeypatch, itertools.repeat(False))
    with Pool(1) as pool, open(os.devnull) as null:
        for _ in range(300):  # tasks are short, so several travel together
            pool.submit(int).result()
        [worker] = pool.worker_pids()
        dispatcher = pool._client.dispatcher
        dispatcher._send_together(4)
        os.kill(worker, signal.SIGSTOP)
        with monkeypatch.context() as queueing:  # until all are there, or the first would travel alone
            queueing.setattr(
                dispatcher, "submitted", lambda task, alone: dispatcher.queued.update({task: alone}) or ()
            )
            late = pool.submit(helpers.end_when_told, str(ledger))
            neighbours = [pool.submit(int) for _ in range(3)]
            pool.stats()
        with pool._client.critical:
            pool._client.perform(dispatcher.assign())
        messages = wire.peek_all(pool._client.links[0].theirs, 1 << 16)
        os.kill(worker, signal.SIGCONT)
        assert len(messages) < 4
        wait_until(lambda: pids(ledger))
        behind = [pool.submit(helpers.pid_with, null) for _ in range(3)]
        late.terminate(grace=1000)
        # As if these 1000 seconds were over: its worker has as many to leave in.
        pool._client.critical.post(pool._client.limits._end_stubborn, late._task)
        assert worker not in {future.result(timeout=20) for future in behind}
        assert [future.result(timeout=20) for future in neighbours] == [0] * 3
        assert pool.stats().lost_workers == 0


def test_who_waits_in_an_inbox_that_cannot_be_emptied_is_given_up_when_it_can(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = room_for_descriptors(monkeypatch, [False] * 3)
    with Pool(1) as pool, open(os.devnull) as null:
        stuck = pool.submit(helpers.stuck, str(ledger))
        wait_until(stuck.running)
        waiting = pool.with_options(queue_timeout=0.1).submit(helpers.pid_with, null)
        assert isinstance(waiting.exception(timeout=20), TaskTimeout)
        assert next(looks, None) is None
        stuck.terminate(grace=0)


def test_what_a_dead_worker_has_not_received_is_run_once_where_descriptors_get_short_in_that_moment(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(1) as pool, open(os.devnull) as null:
        noted = ledger.with_name("noted")
        noted.touch()
        running = pool.submit(helpers.stuck, str(ledger))
        wait_until(lambda: pids(ledger))
        behind = [pool.submit(helpers.read_all, null), pool.submit(helpers.note, str(noted), 1)]
        wait_until(lambda: pool.stats().workers[0].waiting == 2)
        room_for_descriptors(monkeypatch, [True, False])  # another thread opens files, and closes them again
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        for future in behind:
            future.result(timeout=20)
        assert isinstance(running.exception(timeout=20), WorkerLost)
    assert noted.read_text().split() == ["1"]


def test_who_submits_at_the_limit_of_descriptors_waits_for_any_task_to_let_go_of_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hold(file: Any, until: Path) -> str:
        while not until.exists():
            time.sleep(0.001)
        return "held"

    waited = tmp_path / "waited"
    with Pool(2) as pool, open(os.devnull) as null:
        view = pool.with_options(retries=1)  # which keeps them
        longest = view.submit(hold, null, tmp_path / "never")
        try:
            shorter = view.submit(hold, null, waited)
            wait_for = pool._client.wait_for
            monkeypatch.setattr(
                pool._client, "wait_for", lambda *given: (waited.touch(), wait_for(*given))[1]
            )
            monkeypatch.setattr("fdpool.pool.near_limit", lambda _numbers: True)
            assert view.submit(hold, null, waited).result(timeout=20) == "held"
            assert shorter.done()
        finally:
            longest.terminate(grace=0)


def test_the_board_never_names_the_task_before_as_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever point a worker is interrupted between two tasks."""
    monkeypatch.setattr("fdpool._board.here", None)
    board = Board(1)
    page = Page(board.fd, 0)
    page.enter()
    seen = []

    class Words:
        def __init__(self, words: Any) -> None:
            self.words = words

        def __getitem__(self, index: int) -> int:
            return int(self.words[index])

        def __setitem__(self, index: int, value: int) -> None:
            self.words[index] = value
            seen.append(board.running(0)[0])

    page.begin(1)
    page.end()
    words, page._words = page._words, Words(page._words)  # type: ignore[assignment]
    page.may_begin(2, 1)
    assert set(seen) == {0, 2}
    page.end()
    seen.clear()
    page.begin(3)
    assert set(seen) == {0, 3}
    words.release()
    page._area.close()
    board.close()


def test_a_view_waits_for_running_programs_and_does_not_end_them(ledger: Path) -> None:
    cancelled = ledger.with_name("cancelled")
    script = f"echo $$ > {ledger}; until test -e {cancelled}; do sleep 0.01; done; sleep 0.3; exit 3"
    with Pool(1) as pool:
        view = pool.with_options(name="here")
        running = view.run(["sh", "-c", script])
        wait_until(lambda: pids(ledger))
        queued = view.submit(helpers.square, 3)
        queued.add_done_callback(lambda _: cancelled.touch())
        view.shutdown(cancel_futures=True)
        assert queued.cancelled()
        assert running.result(timeout=0).returncode == 3


def test_a_callback_may_shut_a_view_down() -> None:
    with Pool(1) as pool:
        view = pool.with_options(name="here")
        called = []
        gate = view.submit(helpers.spin, 0.2)
        behind = view.submit(helpers.spin, 0.2)
        gate.add_done_callback(lambda _: called.append(view.shutdown()))
        wait_until(lambda: called == [None])  # although nobody else receives what the view would wait for
        assert behind.result(timeout=20)


def test_a_view_that_was_dropped_goes_on_with_its_map() -> None:
    with Pool(1) as pool:
        results = pool.with_options(retries=1).map(helpers.square, range(20), buffersize=2)
        assert list(results) == [n * n for n in range(20)]
        with pool.with_options(retries=1) as view:
            results = view.map(helpers.square, range(20), buffersize=2)
        with pytest.raises(PoolShutDown):
            list(results)


def test_memory_counts_also_where_some_process_below_dies_while_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = SlotLink(0)
    link.pid = os.getpid()

    class Gone:
        def memory_info(self) -> Any:
            raise psutil.NoSuchProcess(1)

    class Forbidden:
        def memory_info(self) -> Any:
            raise psutil.AccessDenied(1)

    me = psutil.Process()
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [Gone(), Forbidden(), me])
    assert link.memory_bytes() > 1.5 * me.memory_info().rss
    link.pid = None
    link.close()


def wait_quietly(future: Future[Any]) -> None:
    with contextlib.suppress(CancelledError):
        future.exception()


def test_a_task_with_limits_may_have_ended_before_its_sender_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(2) as pool:
        awaited = pool.submit(time.sleep, 1000)
        # Who waits receives the answers of others, too, and needs no lock for that.
        waiter = threading.Thread(target=wait_quietly, args=(awaited,))
        waiter.start()
        try:
            wait_until(lambda: pool._client.receiver._awaited is awaited)
            send = wire.try_send

            def send_and_wait(*arguments: Any) -> bool:
                sent = send(*arguments)
                wait_until(lambda: len(pool._client.tasks) == 1)
                return sent

            view = pool.with_options(timeout=60)
            with monkeypatch.context() as slow:
                slow.setattr(wire, "try_send", send_and_wait)
                ended = view.submit(helpers.square, 3)
            assert ended.result(timeout=20) == 9
            assert view.submit(helpers.square, 4).result(timeout=20) == 16
        finally:
            awaited.terminate(grace=0.1)
            waiter.join()
