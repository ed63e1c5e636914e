"""Who receives answers when: waiters, the pump, and what an idle pool costs."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import pytest

from fdpool import Pool, PoolBroken
from fdpool._fixtures.pools import PoolFactory
from tests.process_state import wait_until

from . import helpers


@pytest.fixture
def pool(worker_pool_factory: PoolFactory) -> Pool:
    return worker_pool_factory(2)


def pump_of(pool: Pool) -> threading.Thread:
    """Other pools, such as those of a whole run of tests, have theirs."""
    pump = pool._client.pump
    assert pump is not None
    assert pump._thread is not None
    return pump._thread


def switches(pids: list[int]) -> int:
    """How often the threads of these processes have gone to sleep."""
    total = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


def test_an_idle_pool_does_not_wake_up(pool: Pool) -> None:
    """H11."""
    for _ in range(50):
        pool.submit(helpers.square, 3).result()
    for future in [pool.submit(helpers.square, n) for n in range(2000)]:
        future.result()
    supervisor = pool._client.control
    assert supervisor is not None
    pids = [supervisor.pid, *pool.worker_pids()]
    mine = Path(f"/proc/self/task/{pump_of(pool).native_id}/status")

    def slept() -> str:
        return next(line for line in mine.read_text().splitlines() if line.startswith("voluntary"))

    def quiet() -> bool:
        before = switches(pids), slept()
        time.sleep(0.6)
        return (switches(pids), slept()) == before

    wait_until(quiet)


def test_a_busy_thread_of_the_client_does_not_stall_the_pump(pool: Pool) -> None:
    done: list[int] = []
    for n in range(200):
        pool.submit(helpers.square, n).add_done_callback(lambda future: done.append(future.result()))
    deadline = time.monotonic() + 20
    while len(done) < 200:  # never blocks, never gives way
        assert time.monotonic() < deadline
    assert sorted(done) == [n * n for n in range(200)]


def test_answers_come_by_every_way_of_waiting_right_after_quick_waits(pool: Pool) -> None:
    """Answers are kept from the pump between quick waits; whoever then waits in another way gets them all the same."""
    for _ in range(20):
        for _ in range(20):
            pool.submit(helpers.square, 2).result()
        futures = [pool.submit(helpers.square, n) for n in range(5)]
        assert wait(futures, timeout=10).not_done == set()
        assert {future.result() for future in as_completed(futures, timeout=10)} == {0, 1, 4, 9, 16}
        pool.submit(helpers.square, 2).result()
        future = pool.submit(helpers.square, 3)
        deadline = time.monotonic() + 10
        while not future.done():
            assert time.monotonic() < deadline
        called: list[Future[int]] = []
        pool.submit(helpers.square, 4).add_done_callback(called.append)
        wait_until(lambda called=called: len(called) == 1)


def test_asyncio_and_threads_that_wait_do_not_disturb_each_other(pool: Pool) -> None:
    results: list[int] = []

    def in_thread() -> None:
        results.extend(pool.submit(helpers.square, n).result(timeout=20) for n in range(300))

    async def in_loop() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(pool, helpers.square, n) for n in range(300)))

    threads = [threading.Thread(target=in_thread) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert asyncio.run(in_loop()) == [n * n for n in range(300)]
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(3 * [n * n for n in range(300)])


def test_a_wait_that_times_out_leaves_the_answer_to_the_pump(pool: Pool) -> None:
    read, write = os.pipe()
    with open(read, "rb") as end:
        future = pool.submit(helpers.read_all, end)
    for _ in range(5):
        with pytest.raises(FutureTimeoutError):
            future.result(timeout=0.01)
    os.close(write)
    wait_until(future.done)


def test_a_waiter_is_told_when_its_future_ends_by_other_means(pool: Pool) -> None:
    gate = threading.Event()
    read, write = os.pipe()
    with open(read, "rb") as end:
        blocker = [pool.submit(helpers.read_all, end) for _ in range(2)]
    queued = [pool.submit(helpers.square, n) for n in range(100)]
    seen: list[BaseException | None] = []

    def waiter() -> None:
        gate.set()
        try:
            queued[-1].result(timeout=20)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=waiter)
    thread.start()
    gate.wait()
    assert queued[-1].cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert [type(error).__name__ for error in seen] == ["CancelledError"]
    os.close(write)
    wait(blocker)


@pytest.mark.parametrize("without", ["", "epoll"])
def test_all_of_it_works_without_epoll(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDPOOL_WITHOUT", without)
    with Pool(2) as pool:
        assert pool.submit(helpers.square, 5).result(timeout=10) == 25
        assert [f.result() for f in [pool.submit(helpers.square, n) for n in range(1000)]] == [
            n * n for n in range(1000)
        ]
        assert list(pool.map(helpers.square, range(1000))) == [n * n for n in range(1000)]


def test_a_signal_handler_may_wait_in_the_midst_of_another_wait(pool: Pool) -> None:
    """P14."""
    inner: list[int] = []

    def handle(_number: int, _frame: object) -> None:
        time.sleep(0.001)
        inner.append(pool.submit(helpers.wait_and_tell, 5, 0.3).result(timeout=20))

    pool.submit(helpers.nothing).result(timeout=20)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert pool.submit(helpers.wait_and_tell, 4, 0.2).result(timeout=20) == 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert inner == [5]
    assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def interrupted(pool: Pool, handle: Callable[[], object]) -> BaseException | None:
    """The error of a task that ends as soon as `handle` has begun, which a signal calls while the main thread waits."""
    read, write = os.pipe()

    begun = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if not begun.is_set():
            begun.set()
            os.close(write)
            handle()

    def interrupt(main: int) -> None:
        receiver = pool._client.receiver
        wait_until(lambda: (receiver._awaited is future or receiver._others) and future.running())
        while not begun.is_set():
            # Again, as Python heeds one that comes just before a system call only after that call.
            signal.pthread_kill(main, signal.SIGUSR1)
            begun.wait(0.2)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with open(read, "rb") as end:
            future = pool.submit(helpers.read_all, end)
        thread = threading.Thread(target=interrupt, args=(threading.get_ident(),))
        thread.start()
        try:
            return future.exception()
        finally:
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def wait_for_event(pool: Pool) -> None:
    done = threading.Event()
    pool.submit(helpers.square, 3).add_done_callback(lambda _future: done.set())
    assert done.wait(20)


def wait_for_thread(pool: Pool) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(pool.submit(helpers.square, 3).result()))
    thread.start()
    thread.join(20)
    assert results == [9]


def wait_for_view(pool: Pool) -> None:
    view = pool.with_options(timeout=60)
    view.submit(helpers.square, 3)
    view.shutdown()


@pytest.mark.timeout(40)
@pytest.mark.parametrize(
    "by_other_means",
    [
        pytest.param(Pool.shutdown, id="shutdown"),
        pytest.param(lambda pool: wait([pool.submit(helpers.square, 3)]), id="wait"),
        pytest.param(lambda pool: [*as_completed([pool.submit(helpers.square, 3)])], id="as_completed"),
        pytest.param(
            lambda pool: [*pool.map(helpers.square, [3]), wait_for_event(pool)], id="map then event"
        ),
        wait_for_event,
        wait_for_thread,
        wait_for_view,
    ],
)
@pytest.mark.parametrize("quick_waits_before", [0, 50])
def test_a_signal_handler_in_the_midst_of_a_wait_may_wait_for_the_pool_by_other_means(
    pool: Pool, by_other_means: Callable[[Pool], object], quick_waits_before: int
) -> None:
    for _ in range(quick_waits_before):
        pool.submit(helpers.nothing).result()
    assert interrupted(pool, lambda: by_other_means(pool)) is None


@pytest.mark.timeout(40)
def test_a_signal_handler_in_the_midst_of_a_wait_may_kill_the_workers_and_wait_for_that(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._receiver._CLOSE_S", 20.0)
    took: list[float] = []

    def kill() -> None:
        began = time.monotonic()
        pool.kill_workers()
        pool.shutdown()
        took.append(time.monotonic() - began)

    assert isinstance(interrupted(pool, kill), (PoolBroken, type(None)))
    assert took[0] < 10


@pytest.mark.timeout(40)
def test_what_a_signal_handler_raises_after_the_end_of_the_pool_is_raised(pool: Pool) -> None:
    def end() -> None:
        pool.shutdown()
        raise OSError("enough")

    with pytest.raises(OSError, match="enough"):
        interrupted(pool, end)


def test_a_signal_handler_that_takes_long_keeps_no_processor_busy(pool: Pool) -> None:
    """The thread that it has interrupted is told of its result, and does not look."""
    used: list[float] = []

    def handle() -> None:
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        used.append(time.process_time() - before)

    assert interrupted(pool, handle) is None
    assert used[0] < 0.25


def test_a_long_wait_after_quick_ones_does_not_wake_the_pump(pool: Pool) -> None:
    for _ in range(50):
        pool.submit(helpers.square, 3).result()
    status = Path(f"/proc/self/task/{pump_of(pool).native_id}/status")

    def slept() -> int:
        text = status.read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = slept()
    pool.submit(time.sleep, 0.5).result()
    assert slept() - before < 50


def test_a_worker_that_has_answered_is_among_the_pids() -> None:
    for _ in range(8):
        with Pool(1) as pool:
            pid = pool.submit(os.getpid).result()
            assert pool.worker_pids() == [pid]


def test_a_worker_whose_first_answer_is_told_before_its_news_is_handled_is_among_the_pids() -> None:
    with Pool(1) as pool:
        future = pool.submit(os.getpid)
        held, go_on = threading.Event(), threading.Event()
        found: list[int] = []

        def decide() -> None:
            with pool._client.critical:
                pool._client.wake()  # the pump asks when it is wanted next, and so waits for this as well
                held.set()
                go_on.wait()

        threads = [
            threading.Thread(target=decide),
            threading.Thread(target=lambda: found.extend(pool.worker_pids())),
        ]
        threads[0].start()
        held.wait()
        try:
            pid = future.result()
            threads[1].start()
            threads[1].join(0.05)  # as long as it takes who does not wait for that decision
        finally:
            go_on.set()
            for thread in threads:
                thread.join()
        assert found == [pid]
