"""Tasks and results: what `submit` promises."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import signal
import threading
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


def test_a_result_comes_back(pool: Pool) -> None:
    assert pool.submit(helpers.square, 7).result() == 49


def test_lambdas_closures_and_partials_run_as_they_are(pool: Pool) -> None:
    offset = 3
    assert pool.submit(lambda x: x + offset, 4).result() == 7
    assert pool.submit(partial(helpers.square, 5)).result() == 25


def test_nothing_is_started_before_the_first_task_and_workers_only_on_demand() -> None:
    before = set(threading.enumerate())  # one of which may be ending
    with Pool(4) as pool:
        assert pool.worker_pids() == []
        assert set(threading.enumerate()) <= before
        for _ in range(5):
            pool.submit(helpers.square, 1).result()
        assert len(pool.worker_pids()) == 1


def test_an_exception_keeps_its_type_and_brings_the_remote_traceback(pool: Pool) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        pool.submit(divmod, 1, 0).result()
    with pytest.raises(KeyError) as other:
        pool.submit(lambda: {}["missing"]).result()
    assert other.value.args == ("missing",)
    assert isinstance(caught.value.__cause__, fdpool.RemoteTraceback)
    assert 'lambda: {}["missing"]' in str(other.value.__cause__)


def test_each_future_has_its_own_exception() -> None:
    with Pool(1) as pool:
        first, second = (pool.submit(divmod, 1, 0).exception() for _ in range(2))
    assert first is not second


def test_base_exceptions_of_a_task_end_the_task_and_not_the_worker(pool: Pool) -> None:
    pid = pool.submit(os.getpid).result()
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):

        def leave(kind: type[BaseException] = kind) -> None:
            raise kind(3)

        with pytest.raises(kind):
            pool.submit(leave).result()
    assert pool.submit(os.getpid).result() == pid


def test_an_exception_that_cannot_be_rebuilt_is_told_in_words_and_harms_no_other(pool: Pool) -> None:
    """P3."""
    with pytest.raises(fdpool.RemoteError) as caught:
        pool.submit(helpers.raise_needs_two).result()
    assert caught.value.type_name.endswith("NeedsTwo")
    assert "left and right" in str(caught.value)
    assert "raise_needs_two" in caught.value.traceback
    assert pool.submit(helpers.square, 2).result() == 4


def test_an_exception_with_enormous_arguments_arrives(pool: Pool) -> None:
    """P3."""

    def fail() -> None:
        raise ValueError(b"x" * 3_000_000)

    with pytest.raises(ValueError) as caught:
        pool.submit(fail).result()
    assert len(caught.value.args[0]) == 3_000_000


def test_an_argument_that_cannot_be_pickled_fails_its_future_and_is_named(pool: Pool) -> None:
    """P1."""
    future = pool.submit(print, {"deep": [threading.Lock()]})
    with pytest.raises(fdpool.NotPicklable, match="lock") as caught:
        future.result()
    assert caught.value.may_have_run is False
    assert pool.submit(helpers.square, 2).result() == 4


def test_a_result_that_cannot_be_pickled_fails_its_future_and_is_named(pool: Pool) -> None:
    """P1."""
    with pytest.raises(fdpool.NotPicklable, match="lock") as caught:
        pool.submit(lambda: [threading.Lock()]).result()
    assert caught.value.may_have_run is True
    with pytest.raises(fdpool.NotPicklable, match="generator"):
        pool.submit(lambda: (n for n in range(3))).result()
    assert pool.submit(helpers.square, 2).result() == 4


class UsesPool:
    def __init__(self, pool: Pool) -> None:
        self.workers = pool

    def run(self) -> None: ...


def test_a_pool_or_a_future_in_a_call_is_named(pool: Pool) -> None:
    for kind in (pool, pool.with_options(retries=1)):
        with pytest.raises(
            fdpool.NotPicklable, match=r"at \.__self__\.workers: <.*a pool cannot leave its process"
        ):
            pool.submit(UsesPool(kind).run).result()
    future = pool.submit(helpers.square, 2)
    with pytest.raises(
        fdpool.NotPicklable, match=r"argument 1 .*\[0\]: <TaskFuture.*a future cannot leave its process"
    ):
        pool.submit(helpers.square, [future]).result()


@pytest.mark.parametrize("what", ["error", "recursion"])
def test_a_task_that_cannot_be_loaded_fails_alone(pool: Pool, what: str) -> None:
    """P2."""
    with pytest.raises(fdpool.NotLoadable):
        pool.submit(helpers.square, helpers.ExplodesOnLoad(what)).result()
    assert pool.submit(helpers.square, 2).result() == 4


def test_a_task_that_exits_while_it_is_loaded_fails_alone(pool: Pool) -> None:
    """P2."""
    with pytest.raises(SystemExit):
        pool.submit(helpers.square, helpers.ExplodesOnLoad("exit")).result()
    with pytest.raises(fdpool.WorkerLost, match="exited with code 7"):
        pool.submit(helpers.square, helpers.ExplodesOnLoad("os._exit")).result()
    assert pool.submit(helpers.square, 2).result() == 4


@pytest.mark.parametrize("what", ["error", "recursion", "exit"])
def test_a_result_that_cannot_be_loaded_fails_alone(pool: Pool, what: str) -> None:
    """P2."""
    with pytest.raises((fdpool.NotLoadable, SystemExit)):
        pool.submit(helpers.ExplodesOnLoad, what).result()
    assert pool.submit(helpers.square, 2).result() == 4


def test_large_arguments_and_results_travel_both_ways(pool: Pool) -> None:
    """T7."""
    for size in (0, 1, 30_000, 32_768, 65_536, 65_537, 300_000, 64 * 2**20):
        data = os.urandom(min(size, 4096)) * (size // 4096 + 1)
        data = data[:size]
        assert pool.submit(lambda data: data, data).result() == data


def test_wait_as_completed_callbacks_and_asyncio_work_on_the_futures(pool: Pool) -> None:
    futures = [pool.submit(helpers.square, n) for n in range(5)]
    called: list[int] = []
    for future in futures:
        future.add_done_callback(lambda f: called.append(f.result()))
    _, pending = cf.wait(futures, timeout=10)
    assert not pending
    assert sorted(f.result() for f in cf.as_completed(futures)) == [0, 1, 4, 9, 16]
    wait_until(lambda: len(called) == 5)

    async def through_asyncio() -> list[int]:
        return await asyncio.gather(*(asyncio.wrap_future(pool.submit(helpers.square, n)) for n in range(5)))

    assert asyncio.run(through_asyncio()) == [0, 1, 4, 9, 16]


def test_run_in_executor_takes_the_pool(pool: Pool) -> None:
    async def run() -> int:
        return await asyncio.get_running_loop().run_in_executor(pool, helpers.square, 6)

    assert asyncio.run(run()) == 36


def test_submitting_from_fifty_threads_mixes_nothing_up(pool: Pool) -> None:
    """T26."""
    wrong: list[int] = []

    def work(base: int) -> None:
        futures = {n: pool.submit(helpers.square, n) for n in range(base, base + 40)}
        wrong.extend(n for n, future in futures.items() if future.result() != n * n)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_task_may_have_a_pool_of_its_own(pool: Pool) -> None:
    """P11."""

    def outer(n: int) -> int:
        with Pool(2) as inner:
            return sum(inner.map(helpers.square, range(n)))

    assert pool.submit(outer, 10).result() == 285


def test_a_callback_may_submit_and_the_pool_still_ends(pool: Pool) -> None:
    """P14."""
    more: list[cf.Future[int]] = []
    first = pool.submit(helpers.square, 3)
    first.add_done_callback(lambda _: more.append(pool.submit(helpers.square, 4)))
    wait_until(lambda: more)
    assert more[0].result() == 16


def test_sigint_sent_to_a_worker_interrupts_its_task_and_not_the_worker(pool: Pool, tmp_path: Path) -> None:
    """W1."""
    read, write = os.pipe()
    pid = pool.submit(os.getpid).result()
    with open(write, "wb"):
        with open(read, "rb") as gate:
            future = pool.submit(helpers.touch_and_wait, str(tmp_path / "runs"), gate)
        wait_until((tmp_path / "runs").exists)

        def interrupt() -> bool:
            """Again: a signal just before read(2) is heeded only after it (8 of 3,000)."""
            os.kill(pid, signal.SIGINT)
            return future.done()

        wait_until(interrupt)
        with pytest.raises(KeyboardInterrupt):
            future.result()
    assert pool.submit(os.getpid).result() == pid


def test_a_child_that_a_task_forks_never_answers_for_the_worker(pool: Pool) -> None:
    """P5."""

    def fork() -> int:
        return os.fork()

    child = pool.submit(fork).result()
    assert child > 0
    assert [pool.submit(helpers.square, n).result() for n in range(5)] == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("in_chunk", [False, True])
def test_a_child_that_a_task_forks_ends_with_the_status_that_it_has_earned(
    pool: Pool, in_chunk: bool
) -> None:
    if in_chunk:
        assert list(pool.map(helpers.fork_and_end, ["exit", "raise", "return"] * 16)) == [3, 1, 0] * 16
    else:
        ends = [pool.submit(helpers.fork_and_end, how).result() for how in ("exit", "raise", "return")]
        assert ends == [3, 1, 0]


def test_what_a_task_held_is_let_go_before_the_next(pool: Pool) -> None:
    """H15."""

    def hold_and_fail(file: Any) -> None:
        kept = [file]
        raise ValueError(len(kept))

    with Pool(1) as one:
        before = one.submit(helpers.open_numbers).result()
        with open(__file__, "rb") as file, pytest.raises(ValueError):
            one.submit(hold_and_fail, file).result()
        assert one.submit(helpers.open_numbers).result() == before


class Evasive:
    """A callable, as of a mocking or proxying library, that raises when it is looked into."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)

    def __repr__(self) -> str:
        raise RuntimeError("it has no text")

    def __reduce__(self) -> Any:
        return Evasive, ()  # before Python 3.11 pickle looks for a __getstate__

    def __call__(self, *_: object) -> int:
        return 5


def test_a_callable_that_raises_when_it_is_looked_into_is_run() -> None:
    with Pool(1) as pool:
        assert pool.submit(Evasive()).result() == 5
        assert pool.submit(partial(Evasive(), 1)).result() == 5
        assert list(pool.map(Evasive(), range(2))) == [5, 5]


class EvasiveName(str):
    def __format__(self, spec: str) -> str:
        raise RuntimeError("it is not to be written")


def test_a_function_with_a_name_of_its_own_kind_is_called_a_function() -> None:
    def leave() -> None:
        os._exit(3)

    leave.__qualname__ = EvasiveName("leave")
    with Pool(1) as pool:
        with pytest.raises(fdpool.WorkerLost, match="while it ran function"):
            pool.submit(leave).result()
        assert pool.submit(abs, -5).result() == 5


def leave_at_once(_items: list[int]) -> None:
    os._exit(3)


def test_a_task_of_a_partial_is_named_by_its_function() -> None:
    with Pool(1) as pool, pytest.raises(fdpool.WorkerLost, match="while it ran leave_at_once") as lost:
        pool.submit(partial(leave_at_once, [0] * 100_000)).result()
    assert len(str(lost.value)) < 1_000
