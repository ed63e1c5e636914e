"""A busy worker is killed: how long until its place gives a result again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

from .. import peers
from .._cpu import Meter
from .._gate import gate
from .._measure import Measure, Outcome, Round, Settings, at_most, by_peer
from ..work import noop, tell_and_wait_at


@contextmanager
def recovery(name: str, _settings: Settings) -> Iterator[Round]:
    """A pool of one worker. Where its death breaks the pool, a new pool is made, as a user must."""
    pool = peers.PEERS[name](1)
    with gate() as hold:

        def one_round() -> Outcome:
            nonlocal pool
            pool.submit(tell_and_wait_at, hold.fifo, hold.path)
            (pid,) = hold.heard(1)
            with Meter() as meter:
                os.kill(int(pid), signal.SIGKILL)
                while True:
                    try:
                        pool.call(noop)
                        break
                    except BrokenExecutor:
                        pool.close()
                        pool = peers.PEERS[name](1)
            return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)

        yield one_round
    pool.close()


MEASURES = (
    Measure(
        "recovery",
        "Recovery",
        "from `kill -9` of a busy worker to the next result in its place",
        by_peer(recovery, ("fdpool", "ppe", "mp", "loky", "pebble")),
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        goals=(at_most(20),),
        labels={"ppe": "ProcessPoolExecutor, made anew", "loky": "loky, made anew"},
    ),
)
