"""NumPy arrays: in, in again and again, there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import peers
from .._cpu import Meter, tree_pss
from .._gate import gate
from .._measure import Measure, Outcome, Round, Settings, ahead_of, at_most, by_peer
from ..work import first_of, same, touch_and_wait_at

TASKS = 8


def array_of(size: int) -> Any:
    """An array of `size` bytes, all of it in memory."""
    import numpy

    return numpy.arange(size // 8, dtype=numpy.float64)


@contextmanager
def array_in(name: str, settings: Settings) -> Iterator[Round]:
    """One task, and an array that it has never seen: some peers know one again."""
    with peers.opened(name) as pool:

        def one_round() -> Outcome:
            array = array_of(settings.size)
            with Meter() as meter:
                pool.call(first_of, array)
            return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)

        yield one_round


@contextmanager
def memcpy(settings: Settings) -> Iterator[Round]:
    """The same bytes copied once, to memory that is there already."""
    import numpy

    array = array_of(settings.size)
    copy = array.copy()

    def one_round() -> Outcome:
        numpy.copyto(copy, array)
        return Outcome()

    yield one_round


@contextmanager
def array_again(name: str, settings: Settings) -> Iterator[Round]:
    """Eight tasks that take one array, after a first: through `share` if the pool has it."""
    with peers.opened(name) as pool:
        array = array_of(settings.size)
        share = getattr(getattr(pool, "executor", None), "share", None)
        given = array if share is None else share(array)
        pool.call(first_of, given)

        def one_round() -> Outcome:
            pool.many(first_of, [(given,)] * TASKS)
            return Outcome(TASKS)

        yield one_round


@contextmanager
def there_and_back(name: str, settings: Settings, times: int = 1) -> Iterator[Round]:
    with peers.opened(name) as pool:
        array = array_of(settings.size)

        def one_round() -> Outcome:
            for _ in range(times):
                pool.call(same, array)
            return Outcome(times)

        yield one_round


@contextmanager
def small_there_and_back(name: str, settings: Settings) -> Iterator[Round]:
    with there_and_back(name, settings, 20) as one_round:
        yield one_round


@contextmanager
def held_by_all(name: str, settings: Settings) -> Iterator[Round]:
    """Memory, in copies of the array, that it takes until eight workers have read all of it and keep it."""
    with gate() as hold, peers.opened(name, TASKS) as pool:
        array = array_of(settings.size)

        def one_round() -> Outcome:
            before = tree_pss()
            share = getattr(getattr(pool, "executor", None), "share", None)
            given = array if share is None else share(array)
            with Meter() as meter:
                handles = [pool.submit(touch_and_wait_at, given, hold.fifo, hold.path) for _ in range(TASKS)]
                hold.heard(TASKS)
            copies = (tree_pss() - before) / settings.size
            hold.open()
            for handle in handles:
                pool.result(handle)
            hold.shut()
            return Outcome(value=copies, cpu_s=meter.cpu_s)

        yield one_round


MIB = 2**20

MEASURES = (
    Measure(
        "array-in",
        "Arrays",
        "a NumPy array of 64 MiB in: `submit(first_of, array).result()`",
        {**by_peer(array_in, peers.EVERY), "kernel": memcpy},
        size=64 * MIB,
        quick_size=MIB,
        unit="ms",
        scale=1e3,
        rounds=11,
        quick_rounds=1,
        goals=(ahead_of("ppe", 10), ahead_of("kernel", 0.5)),
        labels={"kernel": "memcpy"},
    ),
    Measure(
        "array-again",
        "Arrays",
        "an array of 64 MiB again: eight tasks that take the same one; a task",
        by_peer(array_again, peers.EVERY),
        size=64 * MIB,
        quick_size=MIB,
        unit="ms",
        scale=1e3,
        rounds=5,
        quick_rounds=1,
        goals=(at_most(1),),
    ),
    Measure(
        "array-back",
        "Arrays",
        "a NumPy array of 64 MiB there and back",
        by_peer(there_and_back, peers.EVERY),
        size=64 * MIB,
        quick_size=MIB,
        unit="ms",
        scale=1e3,
        rounds=9,
        quick_rounds=1,
        goals=(ahead_of("ppe", 8),),
    ),
    Measure(
        "array-back-small",
        "Arrays",
        "a NumPy array of 256 KiB there and back",
        by_peer(small_there_and_back, peers.EVERY),
        size=MIB // 4,
        quick_size=MIB // 4,
        goals=(ahead_of("ppe", 6),),
    ),
    Measure(
        "array-shared",
        "Arrays",
        "an array of 256 MiB, read and kept by 8 workers: copies of it in memory beside the client's",
        by_peer(held_by_all, ("fdpool", "ppe")),
        size=256 * MIB,
        quick_size=MIB,
        unit="copies",
        scale=1,
        rounds=3,
        goals=(at_most(1.1),),
        needs="share",
    ),
)
