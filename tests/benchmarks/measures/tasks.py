"""Tasks that do nothing: one after another, and in a flood from a thread, from eight, and from asyncio."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from .. import peers
from .._measure import Measure, Outcome, Round, Settings, ahead_of, by_peer, within
from ..work import noop


@contextmanager
def round_trip(name: str, settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:

        def one_round() -> Outcome:
            samples = []
            for _ in range(settings.size):
                begun = time.perf_counter()
                pool.call(noop)
                samples.append(time.perf_counter() - begun)
            return Outcome(settings.size, samples=samples)

        yield one_round


@contextmanager
def ping_pong(settings: Settings) -> Iterator[Round]:
    """Two Python processes and a datagram of a task's size there and back, blocking: what the kernel takes for it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ping, pong = b"x" * 100, [b"y" * 30]
    pid = os.fork()
    if pid == 0:
        here.close()
        while there.recvmsg(65536, 1024)[0] != b"":
            there.sendmsg(pong)
        os._exit(0)
    there.close()

    def one_round() -> Outcome:
        samples = []
        for _ in range(settings.size):
            begun = time.perf_counter()
            here.sendmsg([ping])
            here.recvmsg(65536, 1024)
            samples.append(time.perf_counter() - begun)
        return Outcome(settings.size, samples=samples)

    try:
        yield one_round
    finally:
        here.sendmsg([b""])
        os.waitpid(pid, 0)
        here.close()


@contextmanager
def flood(name: str, settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:
        tasks = [()] * settings.size

        def one_round() -> Outcome:
            pool.many(noop, tasks)
            return Outcome(settings.size)

        yield one_round


#: What people write in their scripts: it can be imported from nowhere, so whoever does not fork sends it by value.
SCRIPT = """
import dataclasses
import math

FACTOR = 3

def helper(x):
    return x * FACTOR

def work(x):
    return helper(x) + math.floor(0.5)

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    def moved(self, by):
        return Point(self.x + by, self.y)

def move(point):
    return point.moved(FACTOR)
"""


@contextmanager
def of_a_script(name: str, fn: str, arguments: Callable[[Any], list[Any]]) -> Iterator[Round]:
    """A task of the function of `SCRIPT` for each argument, which are made of the module that has run it."""
    main = sys.modules["__main__"]
    exec(SCRIPT, vars(main))  # before the pool, whose workers may be forks
    with peers.opened(name) as pool:
        tasks = [(argument,) for argument in arguments(main)]

        def one_round() -> Outcome:
            pool.many(getattr(main, fn), tasks)
            return Outcome(len(tasks))

        yield one_round


def flood_of_a_script(name: str, settings: Settings) -> AbstractContextManager[Round]:
    return of_a_script(name, "work", lambda _: list(range(settings.size)))


def flood_of_instances(name: str, settings: Settings) -> AbstractContextManager[Round]:
    """There and back."""
    return of_a_script(name, "move", lambda main: list(map(main.Point, range(settings.size))))


@contextmanager
def flood_of_threads(name: str, settings: Settings) -> Iterator[Round]:
    """Eight threads of the client, each with an eighth of the tasks."""
    with peers.opened(name) as pool, ThreadPoolExecutor(8) as threads:
        share = [()] * (settings.size // 8)

        def one_round() -> Outcome:
            for done in [threads.submit(pool.many, noop, share) for _ in range(8)]:
                done.result()
            return Outcome(len(share) * 8)

        yield one_round


@contextmanager
def flood_of_asyncio(name: str, settings: Settings) -> Iterator[Round]:
    """`run_in_executor` for each, and one `gather`: a pool that is an Executor is all that it takes."""
    loop = asyncio.new_event_loop()
    with peers.opened(name) as pool:

        async def gather() -> None:
            await asyncio.gather(
                *(loop.run_in_executor(pool.executor, noop) for _ in range(settings.size))  # type: ignore[attr-defined]
            )

        def one_round() -> Outcome:
            loop.run_until_complete(gather())
            return Outcome(settings.size)

        yield one_round
    loop.close()


# mpire hangs when several threads submit (2.10.2): its queues are for one.
#: Those that can be given functions of a script, by a fork or by value.
BY_VALUE = ("fdpool", "ppe", "mp", "loky", "pebble")
FROM_THREADS = tuple(name for name in peers.SUBMITTING if name != "mpire")

MEASURES = (
    Measure(
        "round-trip",
        "Tasks",
        "`submit(noop).result()`, one after another",
        {**by_peer(round_trip, peers.EVERY), "kernel": ping_pong},
        size=100,
        quick_size=50,
        rounds=31,
        goals=(ahead_of("ppe", 10), ahead_of("mp", 6), within("kernel", 1.5)),
        labels={"kernel": "a datagram there and back"},
    ),
    Measure(
        "flood",
        "Tasks",
        "10,000 × `submit(noop)`, all results; a task",
        by_peer(flood, peers.EVERY),
        size=10_000,
        quick_size=1000,
        rounds=9,
        goals=(ahead_of("ppe", 15), ahead_of("mp", 4)),
        labels={"joblib": "joblib, all in one call, in its own batches"},
    ),
    Measure(
        "flood-script",
        "Tasks",
        "10,000 × `submit` of a function of the script, all results; a task",
        by_peer(flood_of_a_script, BY_VALUE),
        size=10_000,
        quick_size=500,
        rounds=9,
    ),
    Measure(
        "flood-instances",
        "Tasks",
        "2,000 × an instance of a data class of the script there, and another back; a task",
        by_peer(flood_of_instances, BY_VALUE),
        size=2_000,
        quick_size=200,
        rounds=9,
    ),
    Measure(
        "flood-threads",
        "Tasks",
        "10,000 × `submit(noop)` from 8 threads; a task",
        by_peer(flood_of_threads, FROM_THREADS),
        size=10_000,
        quick_size=800,
        rounds=9,
        goals=(ahead_of("ppe", 5),),
    ),
    Measure(
        "flood-asyncio",
        "Tasks",
        "asyncio: `gather` of 10,000 × `run_in_executor(pool, noop)`; a task",
        by_peer(flood_of_asyncio, ("fdpool", "ppe", "loky")),
        size=10_000,
        quick_size=1000,
        rounds=9,
        goals=(ahead_of("ppe", 5),),
    ),
)
