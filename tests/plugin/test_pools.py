"""The fixtures for pools: fresh ones end with their test, the shared one is mended after each."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

import fdpool
from fdpool._fixtures.pools import PoolFactory, SharedPool, end, profile
from tests.plugin.conftest import Run
from tests.plugin.leavings import leave_child, leave_file, leave_thread
from tests.process_state import wait_until


def test_a_worker_pool_is_fresh_and_runs_tasks(worker_pool: fdpool.Pool) -> None:
    assert worker_pool.worker_pids() == []
    assert worker_pool.submit(pow, 2, 3).result() == 8


def test_the_factory_takes_what_a_pool_takes_and_ends_all_that_it_made() -> None:
    factory = PoolFactory()
    pools = [factory(1), factory(max_workers=2, preload=["json"])]
    workers = [psutil.Process(pool.submit(os.getpid).result()) for pool in pools]
    factory.close()
    assert not any(worker.is_running() for worker in workers)
    with pytest.raises(fdpool.PoolShutDown):
        pools[0].submit(os.getpid)
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        factory(0)


def test_what_still_runs_at_the_end_of_a_test_is_killed() -> None:
    pool = fdpool.Pool(1)
    future = pool.submit(time.sleep, 30)
    queued = [pool.submit(os.getpid) for _ in range(40)]
    while not future.running():
        time.sleep(0.001)
    end(pool, grace_s=1.0)  # in which those that wait are cancelled
    assert isinstance(future.exception(), fdpool.PoolBroken)
    assert all(each.cancelled() for each in queued)


WITHOUT_CURRENT_FOLDER = """
import os, sys
sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
"""


@pytest.mark.parametrize("measured", [False, True])
def test_workers_find_test_modules_that_only_pytest_knows_how_to_import(
    run_pytest: Run, tmp_path: Path, measured: bool
) -> None:
    text = """
        import helpers_of_all
        set_here = None
        def set_it(value):
            global set_here
            set_here = value
        def get_it(): return set_here, __name__, type(__loader__).__name__
        class Found:
            def own(self): return get_it
        def read(file): return file.read(), helpers_of_all.twice(2)
        def test_function(worker_pool):
            assert worker_pool.submit(Found().own).result() is get_it
            assert worker_pool.submit(get_it).result() == (None, __name__, "SourceFileLoader")
            assert worker_pool.submit(lambda: get_it()[1]).result() == __name__
        def test_initializer(worker_pool_factory):
            pool = worker_pool_factory(1, initializer=set_it, initargs=(Found(),))
            assert type(pool.submit(get_it).result()[0]) is Found
        def test_shared(shared_worker_pool, tmp_path):
            (tmp_path / "file").write_text("read")
            with open(tmp_path / "file") as file:
                assert shared_worker_pool.submit(read, file).result() == ("read", 4)
        def test_fork(worker_pool_factory):
            pool = worker_pool_factory(1, start_method="fork", initializer=set_it, initargs=(3,))
            assert pool.submit(get_it).result()[0] == 3
        """
    for folder in ("plain", "package/inner"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "test_other.py").write_text(textwrap.dedent(text))
    for folder in ("package", "package/inner"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "of_all").mkdir()
    (tmp_path / "of_all" / "helpers_of_all.py").write_text("def twice(x): return 2 * x")
    outcome = run_pytest(
        text,
        "--import-mode=importlib",
        *(["--cov=."] if measured else []),
        conftest=WITHOUT_CURRENT_FOLDER,
        ini="pythonpath = of_all\n",
        plugins=["pytest_cov"] if measured else [],
    )
    outcome.assert_counts(passed=12)


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_servers_find_test_modules_where_their_function_cannot_travel_by_value(
    run_pytest: Run, mode: str
) -> None:
    outcome = run_pytest(
        """
        import threading
        lock = threading.Lock()
        def serving(listening):
            with lock:
                listening.accept()[0].sendall(b"x")
        def test_server(serve):
            with serve(serving).listener.connect() as client:
                assert client.recv(1) == b"x"
        def test_service(session_service):
            with session_service("x", serving).listener.connect() as client:
                assert client.recv(1) == b"x"
        """,
        f"--import-mode={mode}",
        conftest=WITHOUT_CURRENT_FOLDER if mode == "importlib" else "",
    )
    outcome.assert_counts(passed=2)


# -- the shared pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (leave_thread, "left with 1 more threads"),
        (leave_child, "left with 1 child processes"),
        (leave_file, "left with 1 more open: /dev/null"),
    ],
)
def test_a_worker_that_is_left_changed_is_replaced_and_named(task, text: str) -> None:  # type: ignore[no-untyped-def]
    """F4."""
    shared = SharedPool(lambda: fdpool.Pool(1))
    try:
        pool = shared.begin()
        pid = pool.submit(os.getpid).result()
        assert shared.audit() == []
        pool.submit(task).result()
        (found,) = shared.audit()
        assert found.startswith(f"worker {pid} was replaced, as it was ")
        assert found.endswith(text)
        assert shared.begin() is pool
        assert pool.submit(os.getpid).result() != pid
        assert shared.audit() == []
    finally:
        shared.close()


def test_a_worker_that_was_tidying_up_when_it_was_looked_at_first_hides_nothing_later() -> None:
    shared = SharedPool(lambda: fdpool.Pool(1))
    try:
        pool = shared.begin()
        clean = shared._clean
        assert clean is not None
        shared._clean = clean._replace(descriptors=clean.descriptors + Counter([os.devnull]))
        assert shared.audit() == []
        pool.submit(leave_file).result()
        (found,) = shared.audit()
        assert found.endswith("left with 1 more open: /dev/null")
    finally:
        shared.close()


def test_folder_and_umask_are_part_of_what_a_worker_has() -> None:
    program = "import os; os.chdir('/'); os.umask(0o027); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE) as process:
        process.stdout.readline()  # type: ignore[union-attr]
        found = profile(process.pid)
        process.communicate(b"\n")
    assert found is not None
    assert (found.folder, found.umask, found.threads, found.children) == ("/", "0027", 1, 0)
    assert found.descriptors == {"pipe": 2, os.readlink("/proc/self/fd/2").partition(":[")[0]: 1}
    assert profile(process.pid) is None


def test_a_shared_pool_that_is_misused_is_replaced() -> None:
    shared = SharedPool(lambda: fdpool.Pool(1))
    try:
        first = shared.begin()
        first.shutdown()
        (found,) = shared.audit()
        assert found == "it was shut down or broken; it belongs to all tests: take worker_pool for that"
        second = shared.begin()
        assert second is not first
        running = second.submit(time.sleep, 30)
        wait_until(running.running)
        (found,) = shared.audit()
        assert found == "sleep was still running, and was killed"
        assert shared.begin() is not second
    finally:
        shared.close()


def test_tests_share_one_pool_and_are_told_what_they_left_in_it(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import os
        pids = set()
        def test_first(shared_worker_pool): pids.add(shared_worker_pool.submit(os.getpid).result())
        def test_second(shared_worker_pool): assert {shared_worker_pool.submit(os.getpid).result()} == pids
        def leave(): globals()["left"] = open(os.devnull)
        def test_third(shared_worker_pool): shared_worker_pool.submit(leave).result()
        def test_fourth(shared_worker_pool): assert not {shared_worker_pool.submit(os.getpid).result()} & pids
        """,
        "--fdpool-leaks=fail",
    )
    outcome.assert_counts(passed=4, error=1)
    outcome.assert_says(
        "ERROR at teardown of test_third",
        "the test left shared_worker_pool otherwise than it was:\n  worker ",
        " was replaced, as it was left with 1 more open: /dev/null",
    )


def test_who_comes_after_a_test_that_misused_the_shared_pool_is_not_blamed(run_pytest: Run) -> None:
    """Another pool is made for it, and stays."""
    outcome = run_pytest(
        """
        import threading, time
        def wait(): threading.Event().wait()
        def test_misuse(shared_worker_pool): shared_worker_pool.shutdown()
        def test_after_that(shared_worker_pool): assert shared_worker_pool.submit(pow, 2, 3).result() == 8
        def test_leaving(shared_worker_pool):
            left = shared_worker_pool.submit(wait)
            while not left.running(): time.sleep(0.001)
        def test_after_it(shared_worker_pool): assert shared_worker_pool.submit(pow, 2, 3).result() == 8
        """,
        "--fdpool-leaks=fail",
    )
    outcome.assert_counts(passed=4, error=2)
    outcome.assert_says("ERROR at teardown of test_misuse", "ERROR at teardown of test_leaving")
