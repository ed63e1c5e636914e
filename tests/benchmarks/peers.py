"""One set of verbs for every pool, so that a measure is written once.

`submit` and `result` are the pool's own functions wherever that is possible: no wrapper of ours is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import Any, ClassVar

from . import work
from ._gate import gate

_result = methodcaller("result")


class Peer:
    """A pool of `workers` processes.

    submit(fn, *args) -> handle; result(handle) -> what the task gave; map(fn, items) -> a list, at the peer's
    own chunk size unless one is given; close() leaves nothing behind.
    """

    module: ClassVar[str]
    imported: ClassVar[str] = ""  # what `from module import ThePool` imports, if that is more
    submits: ClassVar[bool] = True
    in_turn: ClassVar[bool] = True  # a task is given to whichever worker is free, not to one in advance
    submit: Callable[..., Any]
    result: Callable[[Any], Any] = staticmethod(_result)

    def __init__(self, workers: int) -> None:
        raise NotImplementedError

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """One task, and its result."""
        return self.result(self.submit(fn, *args))

    def many(self, fn: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """All tasks at once, and all results."""
        submit, result = self.submit, self.result
        return [result(handle) for handle in [submit(fn, *each) for each in args]]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Executor(Peer):
    """Every `concurrent.futures.Executor`."""

    executor: Any

    def _take(self, executor: Any) -> None:
        self.executor = executor
        self.submit = executor.submit

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return list(
            self.executor.map(fn, items) if chunk is None else self.executor.map(fn, items, chunksize=chunk)
        )

    def close(self) -> None:
        self.executor.shutdown()


class Fdpool(_Executor):
    module = "fdpool"
    imported = "fdpool.pool"

    def __init__(self, workers: int) -> None:
        import fdpool

        self._take(fdpool.Pool(workers))


class FdpoolFork(Fdpool):
    def __init__(self, workers: int) -> None:
        import fdpool

        self._take(fdpool.Pool(workers, start_method="fork"))


class ProcessPool(_Executor):
    module = "concurrent.futures"
    imported = "concurrent.futures.process"
    method = "fork"

    def __init__(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self._take(ProcessPoolExecutor(workers, multiprocessing.get_context(self.method)))


class ProcessPoolForkserver(ProcessPool):
    method = "forkserver"


class Loky(_Executor):
    module = "loky"

    def __init__(self, workers: int) -> None:
        import loky

        self._take(loky.ProcessPoolExecutor(workers))


class MultiprocessingPool(Peer):
    module = "multiprocessing"
    method = "fork"
    result = staticmethod(methodcaller("get"))

    def __init__(self, workers: int) -> None:
        import multiprocessing

        self.pool = multiprocessing.get_context(self.method).Pool(workers)
        apply_async = self.pool.apply_async
        self.submit = lambda fn, *args: apply_async(fn, args)

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return self.pool.map(fn, items, chunk)

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()


class MultiprocessingForkserver(MultiprocessingPool):
    method = "forkserver"


class Pebble(Peer):
    module = "pebble"

    def __init__(self, workers: int) -> None:
        import multiprocessing

        import pebble

        self.pool = pebble.ProcessPool(workers, context=multiprocessing.get_context("fork"))
        schedule = self.pool.schedule
        self.submit = lambda fn, *args: schedule(fn, args)

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return list(self.pool.map(fn, items, chunksize=chunk or 1).result())

    def close(self) -> None:
        self.pool.close()
        self.pool.stop()
        self.pool.join()


class Mpire(Peer):
    module = "mpire"
    in_turn = False
    result = staticmethod(methodcaller("get"))

    def __init__(self, workers: int) -> None:
        import mpire

        self.pool = mpire.WorkerPool(workers, keep_alive=True)
        apply_async = self.pool.apply_async
        self.submit = lambda fn, *args: apply_async(fn, args)

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        return self.pool.map(fn, items, chunk_size=chunk)

    def close(self) -> None:
        self.pool.stop_and_join()
        self.pool.terminate()


class Joblib(Peer):
    """It has no submit: one call of `Parallel` is everything at once."""

    module = "joblib"
    submits = False
    in_turn = False

    def __init__(self, workers: int) -> None:
        import joblib

        self.delayed = joblib.delayed
        self.parallel = joblib.Parallel(n_jobs=workers)
        self.parallel.__enter__()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.parallel([self.delayed(fn)(*args)])[0]

    def many(self, fn: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        task = self.delayed(fn)
        return self.parallel(task(*each) for each in args)

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int | None = None) -> list[Any]:
        task = self.delayed(fn)
        return self.parallel(task(item) for item in items)

    def close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        self.parallel.__exit__(None, None, None)
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


PEERS: dict[str, type[Peer]] = {
    "fdpool": Fdpool,
    "fdpool-fork": FdpoolFork,
    "ppe": ProcessPool,
    "ppe-forkserver": ProcessPoolForkserver,
    "mp": MultiprocessingPool,
    "mp-forkserver": MultiprocessingForkserver,
    "loky": Loky,
    "pebble": Pebble,
    "mpire": Mpire,
    "joblib": Joblib,
}
LABELS = {
    "fdpool": "fdpool",
    "fdpool-fork": 'fdpool, `start_method="fork"`',
    "ppe": "ProcessPoolExecutor",
    "ppe-forkserver": "ProcessPoolExecutor, forkserver",
    "mp": "multiprocessing.Pool",
    "mp-forkserver": "multiprocessing.Pool, forkserver",
    "loky": "loky",
    "pebble": "Pebble",
    "mpire": "mpire",
    "joblib": "joblib",
}
EVERY = ("fdpool", "ppe", "mp", "loky", "pebble", "mpire", "joblib")
STANDARD = ("ppe", "ppe-forkserver", "mp", "mp-forkserver")
SUBMITTING = tuple(name for name in EVERY if PEERS[name].submits)


#: What sides that are no pools need; they are in `servers`, which only their own family imports.
ELSEWHERE = {
    "uvicorn": "uvicorn",
    "gunicorn": "gunicorn",
    "gunicorn-threads": "gunicorn",
    "gunicorn-preload": "gunicorn",
    "gunicorn-uvicorn": "uvicorn_worker",
}


def missing(name: str) -> str | None:
    """The module that this peer lacks here; None for a side that needs none, or one that is there."""
    module = PEERS[name].module if name in PEERS else ELSEWHERE.get(name, "sys")
    return None if importlib.util.find_spec(module) else module


@contextmanager
def opened(name: str, workers: int = 2) -> Iterator[Peer]:
    """The peer, with all its workers started and used, as pools that start them on demand would not have them."""
    pool = PEERS[name](workers)
    try:
        pids(pool, workers)
        yield pool
    finally:
        pool.close()


def pids(pool: Peer, workers: int) -> set[int]:
    """The workers' pids: of so many tasks that run at the same time."""
    if pool.in_turn:
        with gate() as hold:
            handles = [pool.submit(work.tell_and_wait_at, hold.fifo, hold.path) for _ in range(workers)]
            found = set(map(int, hold.heard(workers)))
            hold.open()
            for handle in handles:
                pool.result(handle)
        return found
    found = set()
    steps = 20_000
    while len(found) < workers:
        found |= set(pool.many(work.pid_after, [(steps,)] * workers * 2))
        steps *= 2
    return found
