"""What a program may expect that was written for `ProcessPoolExecutor`, found with CPython's own tests of it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpool
from fdpool import Pool
from tests.process_state import open_descriptors, wait_until

from . import helpers

START_METHODS = ["forkserver", "fork"]


def run_script(source: str) -> str:
    """Run a program of its own; what it printed, if it printed no error and ended well."""
    return run_python("-c", textwrap.dedent(source))


def run_python(*arguments: str, **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def run_in(folder: Path, *arguments: str) -> str:
    """`run_python` in another folder, from which fdpool is found as it is here."""
    return run_python(
        *arguments, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(fdpool.__file__).parents[1])}
    )


@pytest.mark.parametrize(
    ("argument", "error", "says"),
    [
        ({"max_workers": 0}, ValueError, "greater than 0, not 0"),
        ({"max_workers": "4"}, TypeError, "max_workers must be an integer, not '4'"),
        ({"max_workers": 2.5}, TypeError, "max_workers must be an integer, not 2.5"),
        ({"mp_context": "fork"}, TypeError, "mp_context must be a context of multiprocessing.* not 'fork'"),
        ({"start_method": "spawn"}, ValueError, "start_method must be 'forkserver' or 'fork', not 'spawn'"),
        ({"preload": "json"}, TypeError, "not the string 'json'"),
        ({"preload": ["json", 5]}, TypeError, "module names, of which 5 is none"),
    ],
)
def test_an_argument_of_no_use_is_refused_at_once(
    argument: dict[str, Any], error: type[Exception], says: str
) -> None:
    """P10"""
    with pytest.raises(error, match=says):
        Pool(**argument)


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_initargs_may_hold_locks_and_queues_of_multiprocessing(context: str) -> None:
    """In a program of its own, as multiprocessing keeps a process for the semaphores that it has named."""
    printed = run_script(
        f"""
        import multiprocessing, fdpool
        context = multiprocessing.get_context({context!r})
        queue = context.Queue()

        def begin(*given):
            global shared
            shared = given

        def put(n):
            lock, queue = shared
            with lock:
                queue.put(n)

        with fdpool.Pool(2, context, initializer=begin, initargs=(context.Lock(), queue)) as pool:
            list(pool.map(put, range(20)))
        print(*sorted(queue.get(timeout=10) for _ in range(20)))
        """
    )
    assert printed.split() == [str(n) for n in range(20)]


@pytest.mark.parametrize("method", START_METHODS)
def test_what_an_initializer_of_a_script_has_set_is_there_for_its_tasks(method: str) -> None:
    printed = run_script(
        f"""
        import fdpool
        connection = None
        settings = {{}}
        limit, seen = 1, []

        def begin(number):
            global connection, only_here
            connection = [number]
            only_here = number + 1
            settings["number"] = number + 2 * limit

        def work(n):
            seen.append(n)
            return connection, only_here, settings, limit, seen

        class Worker:
            def work(self):
                connection.append(limit)
                return connection

        with fdpool.Pool(1, initializer=begin, initargs=(40,), start_method={method!r}) as pool:
            print(*pool.submit(work, 1).result())
            limit, settings = 2, {{"number": "the client's"}}
            print(*pool.submit(work, 2).result())
            print(pool.submit(Worker().work).result(), pool.submit(lambda: only_here).result())
        with fdpool.Pool(1, initializer=begin, initargs=(50,), max_tasks_per_child=1) as pool:
            print(*pool.map(lambda n: connection, range(2)))
            print(connection, settings)
        """
    )
    assert printed.splitlines() == [
        "[40] 41 {'number': 42} 1 [1]",
        "[40] 41 {'number': 42} 2 [2]",  # `seen` is the client's: the initializer does not refer to it
        "[40, 2] 41",
        "[50] [50]",
        "None {'number': \"the client's\"}",
    ]


def test_what_an_initializer_that_is_inherited_has_set_is_there_for_its_tasks() -> None:
    printed = run_script(
        """
        import fdpool, threading
        mine = None

        def begin(lock):
            global mine
            mine = lock

        def work():
            return mine.locked()

        lock = threading.Lock()
        lock.acquire()
        with fdpool.Pool(1, initializer=begin, initargs=(lock,), start_method="fork") as pool:
            print(pool.submit(work).result())
        """
    )
    assert printed == "True\n"


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_what_a_failing_initializer_logged_has_arrived_when_the_pool_breaks(context: str) -> None:
    printed = run_script(
        f"""
        import logging, multiprocessing, fdpool
        from concurrent.futures import BrokenExecutor
        from logging.handlers import QueueHandler
        context = multiprocessing.get_context({context!r})
        queue = context.Queue()

        def begin(queue):
            logger = logging.getLogger("concurrent.futures")
            logger.addHandler(QueueHandler(queue))
            logger.propagate = False
            raise ValueError("it begins badly")

        with fdpool.Pool(1, context, initializer=begin, initargs=(queue,)) as pool:
            try:
                pool.submit(abs, -1).result()
            except BrokenExecutor as error:
                print(error)
        while not queue.empty():
            print(queue.get().getMessage())
        """
    )
    first, *logged = printed.splitlines()
    assert first.endswith("the pool's initializer failed: ValueError: it begins badly")
    assert logged[-1] == "ValueError: it begins badly"


def test_an_initializer_whose_threads_never_end_still_breaks_the_pool_when_it_fails() -> None:
    def begin() -> None:
        threading.Thread(target=threading.Event().wait).start()
        raise ValueError("it begins badly")

    with Pool(1, initializer=begin) as pool, pytest.raises(fdpool.PoolBroken, match="it begins badly"):
        pool.submit(helpers.square, 2).result(timeout=30)


def test_with_fork_an_initializer_may_take_what_cannot_be_pickled() -> None:
    """W6."""
    lock = threading.Lock()

    def begin(held: Any) -> None:
        helpers.kept = held  # type: ignore[attr-defined]

    with Pool(2, start_method="fork", initializer=begin, initargs=(lock,)) as pool:
        assert pool.submit(lambda: helpers.kept.acquire(blocking=False)).result()  # type: ignore[attr-defined]
    assert not lock.locked()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_tasks_may_use_what_a_manager_manages(start_method: Any) -> None:
    """The manager asks for the key that this process and its children share."""
    with multiprocessing.get_context("fork").Manager() as manager:
        queue = manager.Queue()
        with Pool(2, start_method=start_method) as pool:
            for future in [pool.submit(queue.put, n) for n in range(5)]:
                future.result()
        assert sorted(queue.get() for _ in range(5)) == list(range(5))
        del queue


def test_workers_that_leave_do_not_touch_the_clients_own_children() -> None:
    """Workers forked from the client inherit multiprocessing's list of its children, to be ended at exit."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=signal.pause, daemon=True)
    child.start()
    try:
        with Pool(2, start_method="fork") as pool:
            assert pool.submit(multiprocessing.active_children).result() == []
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
        child.close()


@pytest.mark.parametrize("chunksize", [1, 3])
def test_map_keeps_no_result_that_its_reader_has_let_go(chunksize: int) -> None:
    with Pool(2) as pool:
        for result in pool.map(lambda n: {n}, range(20), chunksize=chunksize):
            seen = weakref.ref(result)
            del result
            wait_until(lambda seen=seen: seen() is None)


def test_neither_arguments_nor_results_nor_futures_are_kept_by_the_pool() -> None:
    class Argument:
        pass

    argument = Argument()
    with Pool(1) as pool:
        future = pool.submit(lambda argument: frozenset([1]), argument)
        future.result()
        refs = [weakref.ref(argument), weakref.ref(future), weakref.ref(future.result())]
        del argument, future
        wait_until(lambda: not any(ref() for ref in refs))


@pytest.mark.parametrize("name", ["__bool__", "__len__"])
def test_an_exception_that_is_falsy_is_raised_all_the_same(name: str) -> None:
    def fail() -> None:
        raise type("Falsy", (Exception,), {name: lambda self: 0 if name == "__len__" else False})("no")

    with Pool(1) as pool:
        future = pool.submit(fail)
        with pytest.raises(Exception, match="no"):
            future.result()


def test_a_pool_that_cannot_start_its_thread_is_broken_and_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(1)
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(fdpool.PoolBroken, match="can't start new thread"):
            pool.submit(helpers.square, 2)
    with pytest.raises(fdpool.PoolBroken):
        pool.submit(helpers.square, 2)
    pool.shutdown()
    assert time.monotonic() - began < 10
    assert pool.worker_pids() == []


@pytest.mark.usefixtures("fresh_supervisors")
def test_a_pool_whose_supervisor_cannot_be_told_the_search_path_is_broken_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = open_descriptors()
    pool = Pool(1)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [*sys.path, "a\0b"])
        for _ in range(2):
            with pytest.raises(fdpool.PoolBroken, match="null byte"):
                pool.submit(helpers.square, 2)
    assert open_descriptors() == before
    pool.shutdown()


class Unflushable:
    def write(self, text: str) -> None:
        pass


@pytest.mark.parametrize("how", ["closed", "without flush", "none"])
def test_a_pool_of_forks_needs_no_standard_output(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = open(os.devnull, "w")
    closed.close()
    monkeypatch.setattr(sys, "stdout", {"closed": closed, "without flush": Unflushable(), "none": None}[how])
    with Pool(1, start_method="fork") as pool:
        assert pool.submit(helpers.square, 2).result() == 4


class SaysNothing(Exception):
    def __init__(self, code: Any = None) -> None:
        self.code = code
        super().__init__()

    def __reduce__(self) -> Any:
        return SaysNothing, ()

    def __str__(self) -> str:
        return f"code {self.code:d}"


def test_an_initializers_exception_breaks_the_pool_even_if_it_has_no_words_here() -> None:
    def begin() -> None:
        raise SaysNothing(5)

    with Pool(1, initializer=begin) as pool:
        with pytest.raises(fdpool.PoolBroken, match="initializer failed: SaysNothing") as caught:
            pool.submit(helpers.square, 2).result(timeout=30)
        assert isinstance(caught.value.__cause__, SaysNothing)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_child_that_an_initializer_forks_is_no_second_worker(start_method: Any, fails: bool) -> None:
    read, write = os.pipe()

    def begin(end: Any) -> None:
        pid = os.fork()
        if pid == 0:
            if fails:
                raise LookupError
            return
        with end:
            end.write(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with (
        open(write, "wb") as end,
        Pool(1, initializer=begin, initargs=(end,), start_method=start_method) as pool,
    ):
        futures = [pool.submit(os.getpid) for _ in range(20)]
        assert len({future.result(timeout=20) for future in futures}) == 1
    with open(read, "rb") as status:
        assert status.read() == (b"1" if fails else b"0")


class Refusal:
    def __reduce__(self) -> str:
        raise ValueError("it stays here")


@pytest.mark.parametrize("refusal", [threading.Lock(), Refusal()], ids=["by-pickle", "by-itself"])
def test_neither_the_future_of_a_call_that_cannot_be_pickled_nor_its_error_keeps_the_arguments(
    refusal: object,
) -> None:
    """Of its frames there is a text, where they are not only ours."""

    class Argument:
        pass

    def refused(pool: Pool) -> list[weakref.ref[Any]]:
        argument = Argument()
        future = pool.submit(print, argument, refusal)
        error = future.exception()
        assert isinstance(error, fdpool.NotPicklable)
        said = "".join(traceback.format_exception(error))
        assert ("in __reduce__" in said) is isinstance(refusal, Refusal)
        return [weakref.ref(argument), weakref.ref(future)]

    gc.disable()
    try:
        with Pool(1) as pool:
            assert [ref() for ref in refused(pool)] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_pool_without_a_living_worker_shuts_down_at_once(
    start_method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._lifetime._LEAVE_S", 60.0)
    with Pool(2, start_method=start_method) as pool:
        with pytest.raises(fdpool.WorkerLost):
            pool.submit(os._exit, 3).result()
        wait_until(lambda: pool.worker_pids() == [])
        began = time.monotonic()
    assert time.monotonic() - began < 20


def test_an_ended_pools_thread_needs_no_garbage_collector() -> None:
    before = set(threading.enumerate())
    gc.disable()
    try:
        with Pool(1) as pool:
            pool.submit(helpers.square, 2).result()
            [thread] = [weakref.ref(t) for t in threading.enumerate() if t not in before]
        wait_until(lambda: thread() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_shutdown_without_waiting_does_not_hang_or_lose_tasks_at_interpreter_exit(start_method: str) -> None:
    printed = run_script(
        f"""
        import os, fdpool
        pool = fdpool.Pool(3, start_method={start_method!r})
        for n in range(5):
            pool.submit(os.write, 1, b"%d\\n" % n)  # one call: print makes two where Python does not buffer
        pool.shutdown(wait=False)
        """
    )
    assert sorted(printed.split()) == list("01234")


def test_workers_with_a_limit_of_tasks_are_replaced_after_the_pool_was_shut_down() -> None:
    """And after it was dropped: it finishes what it was given."""
    pool = Pool(1, max_tasks_per_child=1)
    futures = [pool.submit(os.getpid) for _ in range(4)]
    pool.shutdown(wait=False)
    del pool
    assert len({future.result(timeout=30) for future in futures}) == 4


@pytest.mark.parametrize("start_method", START_METHODS)
def test_sigterm_ends_a_worker_whose_task_never_comes_back_to_python(start_method: Any) -> None:
    with Pool(1, start_method=start_method) as pool:
        pid = pool.submit(os.getpid).result()
        future = pool.submit(lambda: sum(itertools.repeat(1)))
        wait_until(lambda: future.running() and psutil.Process(pid).cpu_times().user > 0.05)
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(fdpool.WorkerLost, match="SIGTERM"):
            future.result(timeout=10)
        assert pool.submit(helpers.square, 3).result() == 9


@pytest.mark.parametrize("method", START_METHODS)
def test_functions_and_classes_of_a_script_may_have_caches(method: str) -> None:
    printed = run_script(
        f"""
        import fdpool, functools

        @functools.cache
        def sum_to(n):
            return n + sum_to(n - 1) if n else 0

        class Table:
            @functools.cached_property
            def size(self):
                return sum_to(4)

        @functools.lru_cache(maxsize=2)
        def once(n):
            return [n]

        def same(n):
            return once(n) is once(n), once.cache_parameters()["maxsize"]

        def adder(by):
            return functools.lru_cache(lambda n: n + by)

        with fdpool.Pool(1, start_method={method!r}) as pool:
            print(pool.submit(sum_to, 3).result(), pool.submit(lambda: Table().size).result())
            print(*pool.submit(same, 1).result(), pool.submit(adder(2), 40).result(), *pool.map(sum_to, range(3)))
        """
    )
    assert printed == "6 10\nTrue 2 42 0 1 3\n"


def test_in_a_map_calls_of_a_script_do_not_see_what_others_have_rebound() -> None:
    printed = run_script(
        """
        import fdpool
        count = 0

        def number(_):
            global count
            count += 1
            return count

        def attribute(_):
            attribute.count += 1
            return attribute.count

        attribute.count = 0
        with fdpool.Pool(1) as pool:
            print({*pool.map(number, range(100))}, {*pool.map(attribute, range(100))})
        """
    )
    assert printed == "{1} {1}\n"


def test_functions_of_a_script_travel_from_a_process_that_multiprocessing_has_spawned(tmp_path: Path) -> None:
    """There they are of a module `__mp_main__`."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing, fdpool

            def square(n):
                return n * n

            def serve():
                with fdpool.Pool(1) as pool:
                    print(pool.submit(square, 3).result(), *pool.map(square, range(3)), flush=True)

            if __name__ == "__main__":
                process = multiprocessing.get_context("spawn").Process(target=serve)
                process.start()
                process.join()
            """
        )
    )
    assert run_in(tmp_path, "script.py") == "9 0 1 4\n"


def run_as_module(folder: Path, source: str, then: str = "") -> str:
    """Import a program as a module `jobs`, and go on so; what it printed, if it printed no error."""
    (folder / "jobs.py").write_text(textwrap.dedent(source))
    return run_in(folder, "-c", f"import jobs{then}")


def test_a_module_that_uses_a_pool_as_it_is_imported_does_not_start_pools_without_end(tmp_path: Path) -> None:
    printed = run_as_module(
        tmp_path,
        """
        import fdpool

        def square(n):
            return n * n

        with fdpool.Pool(1) as pool:
            print(pool.submit(square, 3).exception(), flush=True)
        """,
    )
    # Of the first pool's worker, whose pool's worker was refused; and of the client.
    refused, fine = printed.splitlines()
    assert "line 8 of module 'jobs' uses a pool, as the module is imported in a worker" in refused
    assert fine == "None"


@pytest.mark.parametrize("method", START_METHODS)
def test_a_module_may_use_a_pool_as_it_is_imported_in_a_worker_also(tmp_path: Path, method: str) -> None:
    (tmp_path / "script.py").write_text(
        "import fdpool\n"
        "if __name__ == '__main__':\n"
        "    with fdpool.Pool(1) as pool: print(pool.submit(abs, -5).result())\n"
    )
    printed = run_as_module(
        tmp_path,
        f"""
        import math, runpy, subprocess, sys, fdpool
        with fdpool.Pool(1) as pool:
            roots = list(pool.map(math.sqrt, [1, 4]))

        def use(_):
            runpy.run_path("script.py", run_name="__main__")
            return roots

        def go():
            with fdpool.Pool(1, start_method={method!r}) as pool:
                print(pool.submit(use, 0).result(), flush=True)
                print(pool.run([sys.executable, "script.py"], stdout=subprocess.PIPE).result().stdout)
        """,
        "; jobs.go()",
    )
    assert "[1.0, 2.0]" in printed
    assert r"b'5\n'" in printed
