"""`map`: items that do nothing, items of 20 µs, and items of very different length."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import peers
from .._measure import Measure, Outcome, Round, Settings, ahead_of, by_peer
from ..work import noop, spin

# What ProcessPoolExecutor and loky are tried with, as their default of 1 is of no use for short items.
CHUNKS = (1000, 10_000, 100_000)
AT_BEST = ("ppe", "loky", "pebble")


@contextmanager
def map_of(name: str, settings: Settings, item_steps: int | None = None) -> Iterator[Round]:
    """A map at the peer's default chunk size; at the best of some where that is one item."""
    with peers.opened(name) as pool:
        function = noop if item_steps is None else spin
        items = range(settings.size) if item_steps is None else [item_steps] * settings.size
        chunk = None
        if name in AT_BEST:
            chunk = min(_tried(settings.size), key=lambda size: _seconds(pool, function, items, size))

        def one_round() -> Outcome:
            pool.map(function, items, chunk)
            return Outcome(settings.size)

        yield one_round


def _tried(size: int) -> list[int]:
    return [chunk for chunk in CHUNKS if chunk * 2 <= size] or [max(1, size // 8)]


def _seconds(pool: peers.Peer, function, items, chunk: int) -> float:
    begun = time.perf_counter()
    pool.map(function, items, chunk)
    return time.perf_counter() - begun


@contextmanager
def map_short(name: str, settings: Settings) -> Iterator[Round]:
    with map_of(name, settings, settings.step) as one_round:
        yield one_round


def uneven(settings: Settings) -> list[int]:
    """Steps of each item: one in fifty takes a thousand times as long."""
    return [settings.step * (1000 if number % 50 == 25 else 1) for number in range(settings.size)]


@contextmanager
def map_uneven(name: str, settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:
        items = uneven(settings)

        def one_round() -> Outcome:
            pool.map(spin, items)
            return Outcome()

        yield one_round


@contextmanager
def submit_uneven(name: str, settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:
        items = [(steps,) for steps in uneven(settings)]

        def one_round() -> Outcome:
            pool.many(spin, items)
            return Outcome()

        yield one_round


@contextmanager
def shared_out(items: Sequence[int], count: float) -> Iterator[Round]:
    """Work over cores: two processes that are there already each do one half, with nothing to tell but the end."""
    total = sum(items)
    begin_read, begin_write = os.pipe()
    end_read, end_write = os.pipe()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            os.close(begin_write)
            while os.read(begin_read, 1):
                # Item by item, as calls of the same function are part of the work.
                done = 0
                for steps in items:
                    spin(steps // 2)
                    done += steps // 2
                spin(total // 2 - done)
                os.write(end_write, b"x")
            os._exit(0)
        pids.append(pid)

    def one_round() -> Outcome:
        os.write(begin_write, b"xx")
        came = 0
        while came < 2:
            came += len(os.read(end_read, 2 - came))
        return Outcome(count)

    try:
        yield one_round
    finally:
        os.close(begin_write)
        for pid in pids:
            os.waitpid(pid, 0)
        for fd in (begin_read, end_read, end_write):
            os.close(fd)


@contextmanager
def ideal_short(settings: Settings) -> Iterator[Round]:
    with shared_out([settings.step] * settings.size, settings.size) as one_round:
        yield one_round


@contextmanager
def ideal_uneven(settings: Settings) -> Iterator[Round]:
    with shared_out(uneven(settings), 1) as one_round:
        yield one_round


IDEAL = {"ideal": "the same work halved, in two bare processes"}
CHUNKED = {name: f"{peers.LABELS[name]}, best chunk size" for name in AT_BEST}

MEASURES = (
    Measure(
        "map",
        "Maps",
        "`map(noop, range(1_000_000))`; an item",
        by_peer(map_of, peers.EVERY),
        size=1_000_000,
        quick_size=10_000,
        rounds=5,
        goals=(ahead_of("mp", 1), ahead_of("ppe", 3)),
        labels=CHUNKED,
    ),
    Measure(
        "map-short",
        "Maps",
        "`map` of 20 µs items; an item",
        {**by_peer(map_short, peers.EVERY), "ideal": ideal_short},
        size=20_000,
        quick_size=2000,
        rounds=9,
        goals=(ahead_of("ideal", 0.95),),
        labels=IDEAL | CHUNKED,
    ),
    Measure(
        "map-uneven",
        "Maps",
        "`map` of 1000 items, one in fifty 1000× longer than 20 µs; all",
        {**by_peer(map_uneven, peers.EVERY), "ideal": ideal_uneven},
        size=1000,
        quick_size=200,
        unit="ms",
        scale=1e3,
        rounds=9,
        goals=(ahead_of("ideal", 0.95),),
        labels=IDEAL,
    ),
    Measure(
        "submit-uneven",
        "Maps",
        "`submit` of 1000 items, one in fifty 1000× longer than 20 µs; all",
        {**by_peer(submit_uneven, peers.SUBMITTING), "ideal": ideal_uneven},
        size=1000,
        quick_size=200,
        unit="ms",
        scale=1e3,
        rounds=9,
        goals=(ahead_of("ideal", 0.95),),
        labels=IDEAL,
    ),
)
