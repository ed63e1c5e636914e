"""Cold start: from `Pool()` to the first result, for a first and a second pool, and of one more worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from .. import _fresh, peers
from .._cpu import Meter
from .._gate import gate
from .._measure import Measure, Outcome, Round, Settings, ahead_of, at_most, by_peer, within
from ..work import noop, tell_and_wait_at


@contextmanager
def first_pool(name: str, _settings: Settings) -> Iterator[Round]:
    yield partial(_fresh.outcome, "start", name)


@contextmanager
def whole_script(name: str, _settings: Settings) -> Iterator[Round]:
    yield partial(_fresh.until_it_speaks, "start", name)


@contextmanager
def bare_interpreter(_settings: Settings) -> Iterator[Round]:
    names = [name for name in _fresh.ask("modules", "fdpool") if not name.startswith("__")]
    yield partial(_fresh.outcome, "bare", ",".join(names))


@contextmanager
def second_pool(name: str, _settings: Settings) -> Iterator[Round]:
    """While another pool of this client is there, and has been used."""
    with peers.opened(name):

        def one_round() -> Outcome:
            with Meter() as meter:
                pool = peers.PEERS[name](2)
                pool.call(noop)
            pool.close()
            return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)

        yield one_round


@contextmanager
def second_worker(name: str, _settings: Settings) -> Iterator[Round]:
    """A task that needs one more worker, as the only one there is busy."""
    with gate() as hold:

        def one_round() -> Outcome:
            pool = peers.PEERS[name](2)
            pool.call(noop)
            busy = pool.submit(tell_and_wait_at, hold.fifo, hold.path)
            hold.heard(1)
            with Meter() as meter:
                pool.call(noop)
            hold.open()
            pool.result(busy)
            pool.close()
            hold.shut()
            return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)

        yield one_round


@contextmanager
def bare_fork(_settings: Settings) -> Iterator[Round]:
    def one_round() -> Outcome:
        read, write = os.pipe()
        with Meter() as meter:
            pid = os.fork()
            if pid == 0:
                os.write(write, b"x")
                os._exit(0)
            os.read(read, 1)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
        return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)

    yield one_round


FORK = {"fdpool": peers.LABELS["fdpool-fork"]}
FORKING = ("ppe", "mp", "pebble", "mpire")

MEASURES = (
    Measure(
        "start",
        "Starting",
        "`Pool()` to its first result, in a fresh client; workers from a fresh interpreter",
        {
            **by_peer(first_pool, ("fdpool", "ppe-forkserver", "mp-forkserver", "loky", "joblib")),
            "bare": bare_interpreter,
        },
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        quick_rounds=1,
        goals=(within("bare", 1.3), ahead_of("ppe-forkserver", 2)),
        labels={"bare": "an interpreter that imports what fdpool's worker has imported"},
    ),
    Measure(
        "start-fork",
        "Starting",
        "`Pool()` to its first result, in a fresh client; workers forked from it",
        {"fdpool": partial(first_pool, "fdpool-fork"), **by_peer(first_pool, FORKING)},
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        quick_rounds=1,
        goals=(ahead_of("ppe", 1),),
        labels=FORK,
    ),
    Measure(
        "start-script",
        "Starting",
        "from a script's start to its first result: the interpreter, the imports, the pool",
        by_peer(
            whole_script, ("fdpool", "fdpool-fork", "ppe", "ppe-forkserver", "mp", "loky", "pebble", "mpire")
        ),
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        quick_rounds=1,
    ),
    Measure(
        "start-second",
        "Starting",
        "a second pool of the same client, to its first result",
        by_peer(second_pool, ("fdpool", "fdpool-fork", "ppe", "ppe-forkserver", "mp", "loky", "pebble")),
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        quick_rounds=1,
        goals=(at_most(10),),
    ),
    Measure(
        "start-worker",
        "Starting",
        "one more worker, to its first result",
        {**by_peer(second_worker, ("fdpool", "ppe-forkserver")), "kernel": bare_fork},
        size=1,
        quick_size=1,
        unit="ms",
        scale=1e3,
        quick_rounds=1,
        goals=(at_most(5),),
        labels={"kernel": "a fork, to a byte from the child"},
    ),
)
