"""A task that carries a socket, beside the same task without."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .. import peers
from .._measure import Measure, Outcome, Round, Settings, ahead_of, by_peer, within
from ..work import close_it, noop


@contextmanager
def with_socket(name: str, settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:
        here, there = socket.socketpair()
        with here, there:

            def one_round() -> Outcome:
                samples = []
                for _ in range(settings.size):
                    begun = time.perf_counter()
                    pool.call(close_it, there)
                    samples.append(time.perf_counter() - begun)
                return Outcome(settings.size, samples=samples)

            yield one_round


@contextmanager
def without(settings: Settings) -> Iterator[Round]:
    with peers.opened("fdpool") as pool:

        def one_round() -> Outcome:
            samples = []
            for _ in range(settings.size):
                begun = time.perf_counter()
                pool.call(noop, None)
                samples.append(time.perf_counter() - begun)
            return Outcome(settings.size, samples=samples)

        yield one_round


MEASURES = (
    Measure(
        "socket",
        "Descriptors",
        "a task with one socket, `submit(close_it, socket).result()`, one after another",
        {**by_peer(with_socket, peers.SUBMITTING), "without": without},
        size=100,
        quick_size=20,
        rounds=21,
        goals=(ahead_of("ppe", 20), ahead_of("mp", 20), within("without", 1.3)),
        labels={"without": "fdpool, a task without a socket"},
    ),
)
