"""One chaos: submits, disturbs, and says what was wrong."""

from __future__ import annotations

import concurrent.futures as cf
import errno
import gc
import logging
import random
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import fdpool
from tests.process_state import children, open_descriptors

from .disorder import Assassin, Thief, started
from .kinds import KINDS, SPAN, World
from .tasks import logs

#: What the pools are beside the plain one: of two workers each, which come and go by themselves all the time.
CHARACTERS: tuple[dict[str, Any], ...] = (
    {"min_workers": 1, "idle_timeout": 0.05, "max_age": 2.0},
    {"max_tasks_per_child": 30, "max_memory": 300 << 20},
)


class Chaos:
    """One run.

    Args:
        seed: of all dice.
        tasks: how many, at most.
        seconds: how long tasks are submitted, at most.
        workers, threads: of the plain pool; that submit.
        pauses: the least and the longest between two disturbances.
        thief: the client lacks descriptors now and then.

    Attributes:
        done: how often each kind was tried.
        failed: how often tasks were lost to a disturbance, by the error's type.
        disturbed: how often each was done, and to whom: ("kill", "worker"), ("stop", "descendant") ...
    """

    def __init__(
        self,
        seed: int,
        tasks: int = 1 << 60,
        seconds: float = 1e9,
        workers: int = 3,
        threads: int = 6,
        pauses: tuple[float, float] = (0.005, 0.08),
        thief: bool = True,
    ) -> None:
        self.tasks, self.seconds, self.workers, self.threads = tasks, seconds, workers, threads
        self.pauses, self.thief = pauses, thief
        self.dice = random.Random(seed)
        self.disturbed: Counter[tuple[str, str]] = Counter()
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    @property
    def kills(self) -> int:
        """How many workers were killed."""
        return self.disturbed["kill", "worker"]

    def run(self) -> list[str]:
        """The whole run; returns what was wrong."""
        import numpy  # noqa: F401 - a task of `array` may find no descriptor to import it with, and half of it done

        fds_before, children_before = set(open_descriptors()), set(children())
        with tempfile.NamedTemporaryFile(buffering=0) as file, records_of_workers() as records:
            with open(file.name, "ab", buffering=0) as ledger, ExitStack() as stack:
                worlds: list[World] = []
                for options in ({}, *CHARACTERS):
                    workers = 2 if options else self.workers
                    pool = stack.enter_context(fdpool.Pool(workers, log_level="WARNING", **options))
                    # The limit on open files that a thief sets is inherited by who is started then.
                    pool.submit(int).result()
                    table = stack.enter_context(pool.share([n * 7 for n in range(1000)]))
                    first = worlds[0] if worlds else World(pool, ledger, file.name, table)
                    worlds.append(replace(first, pool=pool, table=table))
                self._disturbed(worlds)
                if strays := sum(world.pool.stats().strays for world in worlds):
                    self.wrong.append(f"{strays} messages that no worker is to send")
            entries = file.read()
        self._judge_ledger(worlds[0], entries)
        self._judge_records(worlds[0], records)
        self.wrong += [
            f"a future called back {count} times" for count in worlds[0].called_back.values() if count != 1
        ]
        if self.failed["WorkerLost"] > self.kills * (1 + self.threads):
            self.wrong.append(f"{self.failed['WorkerLost']} tasks lost by {self.kills} kills")
        gc.collect()
        if left := set(open_descriptors()) - fds_before:
            self.wrong.append(f"descriptors left: {left}")
        if left := set(children()) - children_before:
            self.wrong.append(f"processes left: {left}")
        return self.wrong

    def _disturbed(self, worlds: list[World]) -> None:
        assassin = Assassin(
            [world.pool for world in worlds], random.Random(self.dice.getrandbits(32)), self.pauses
        )
        thief = Thief(random.Random(self.dice.getrandbits(32)))
        actors = [assassin.act, thief.act] if self.thief else [assassin.act]
        stop = threading.Event()
        ends = time.monotonic() + self.seconds
        clients = [
            threading.Thread(
                target=self._client,
                args=(worlds, range(n + 1, self.tasks + 1, self.threads), self.dice.getrandbits(32), ends),
            )
            for n in range(self.threads)
        ]
        disturbers = started(actors, stop)
        try:
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
        finally:
            stop.set()
            for thread in disturbers:
                thread.join()
        self.disturbed = assassin.done
        if thief.done:
            self.disturbed["squeeze", "client"] = thief.done

    def _client(self, worlds: list[World], numbers: range, seed: int, ends: float) -> None:
        """Runs in: each of the threads that submit."""
        dice = random.Random(seed)
        kinds, weights = list(KINDS), list(KINDS.values())
        for number in numbers:
            if time.monotonic() > ends:
                return
            kind = dice.choices(kinds, weights)[0]
            world = dice.choices(worlds, (3, 1, 1))[0]
            problem = self._attempt(partial(kind, world, number * SPAN, dice))
            with self._lock:
                self.done[kind.__name__] += 1
                if problem is not None:
                    self.wrong.append(f"task {number} ({kind.__name__}): {problem}")

    def _attempt(self, attempt: Callable[[], None]) -> str | None:
        """What was wrong with one task, or None."""
        try:
            attempt()
        except fdpool.WorkerLost:
            self._note("WorkerLost")
        except cf.TimeoutError:
            return "it hangs"
        except BaseException as error:
            if self.thief and _lacks_descriptors(error):
                self._note(type(error).__name__)
                return None
            return traceback.format_exc(limit=-4)
        return None

    def _note(self, name: str) -> None:
        with self._lock:
            self.failed[name] += 1

    def _judge_ledger(self, world: World, entries: bytes) -> None:
        ran = Counter(map(int, entries.split()))
        for number, count in ran.items():
            if count > world.tries.get(number, 1):
                self.wrong.append(f"{_named(number)} ran {count} times")
            if number in world.never:
                self.wrong.append(f"{_named(number)} ran, and was said not to have")
        self.wrong += [
            f"{_named(number)} gave a result, and has not run" for number in world.ran - ran.keys()
        ]

    def _judge_records(self, world: World, records: list[logging.LogRecord]) -> None:
        came = Counter(int(record.getMessage().split()[1]) for record in records)
        self.wrong += [
            f"{_named(number)} logged {count} times" for number, count in came.items() if count > 1
        ]
        self.wrong += [f"the record of {_named(number)} was lost" for number in world.logged - came.keys()]


@contextmanager
def records_of_workers() -> Iterator[list[logging.LogRecord]]:
    """What workers log meanwhile."""
    found: list[logging.LogRecord] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    logger, handler = logging.getLogger(logs.__module__), Keeper()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _named(number: int) -> str:
    task, part = divmod(number, SPAN)
    return f"task {task}" + (f", its part {part}" if part else "")


def _lacks_descriptors(error: BaseException | None) -> bool:
    """True if it is for want of descriptors, as the errors that it was raised from say."""
    if error is None or isinstance(error, fdpool.PoolBroken):
        return False  # the want passes; a pool that has broken for it does not come back
    if isinstance(error, fdpool.FdTransferError) or (
        isinstance(error, OSError) and error.errno == errno.EMFILE
    ):
        return True
    return "Too many open files" in str(error) or _lacks_descriptors(error.__cause__)
