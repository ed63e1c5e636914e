"""What a pool takes while it does nothing: memory of its processes and of queued tasks, wake-ups, CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .. import _fresh, peers
from .._cpu import tree, tree_cpu_s, uss
from .._measure import Measure, Outcome, Round, Settings, ahead_of, at_most, by_peer
from ..work import noop

FORKED_AND_FRESH = ("fdpool", "fdpool-fork", "ppe", "ppe-forkserver", "mp", "loky", "pebble", "mpire")


@contextmanager
def of_a_worker(name: str, _settings: Settings) -> Iterator[Round]:
    with peers.opened(name) as pool:
        pids = peers.pids(pool, 2)
        yield lambda: Outcome(value=statistics.median(map(uss, pids)), cpu_s=0.0)


@contextmanager
def of_all(name: str, _settings: Settings) -> Iterator[Round]:
    with peers.opened(name):
        yield lambda: Outcome(value=sum(uss(pid) for pid in list(tree(os.getpid()))[1:]), cpu_s=0.0)


@contextmanager
def of_a_queued_task(name: str, settings: Settings) -> Iterator[Round]:
    yield partial(_fresh.outcome, "queue", name, str(settings.size))


@contextmanager
def idle(name: str, settings: Settings) -> Iterator[Round]:
    """`size` milliseconds of nothing: wake-ups and CPU a second, without those of the sleep that waits for it."""
    with peers.opened(name) as pool:
        second = settings.size / 1000
        pool.call(noop)

        def one_round() -> Outcome:
            before, cpu_before, own_before = _wake_ups(), tree_cpu_s(), time.thread_time()
            time.sleep(second)
            cpu_s, own_s = tree_cpu_s() - cpu_before, time.thread_time() - own_before
            after = _wake_ups()
            woken = sum(count - before.get(thread, 0) for thread, count in after.items())
            return Outcome(value=woken / second, cpu_s=max(0.0, cpu_s - own_s) / second)

        yield one_round


def _wake_ups() -> dict[str, int]:
    """Times that each thread of the tree has waited so far, but for this one."""
    found = {}
    for pid in tree(os.getpid()):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if int(thread) == os.getpid():
                continue
            status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
            found[thread] = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found


MEASURES = (
    Measure(
        "memory-worker",
        "Footprint",
        "unique memory (USS) of an idle worker",
        by_peer(of_a_worker, FORKED_AND_FRESH),
        size=1,
        quick_size=1,
        unit="MiB",
        scale=1 / 2**20,
        rounds=3,
        quick_rounds=1,
        goals=(ahead_of("ppe", 2),),
    ),
    Measure(
        "memory-pool",
        "Footprint",
        "unique memory of all processes of a pool with 2 idle workers, but for the client",
        by_peer(of_all, FORKED_AND_FRESH),
        size=1,
        quick_size=1,
        unit="MiB",
        scale=1 / 2**20,
        rounds=3,
        quick_rounds=1,
    ),
    Measure(
        "memory-queued",
        "Footprint",
        "memory of the client for each of 1,000,000 queued `noop`; CPU of submitting one",
        by_peer(of_a_queued_task, ("fdpool", "ppe", "mp", "loky", "pebble")),
        size=1_000_000,
        quick_size=10_000,
        unit="bytes",
        scale=1,
        rounds=1,
        quick_rounds=1,
        warm_up=False,
        goals=(ahead_of("ppe", 1),),
    ),
    Measure(
        "idle",
        "Footprint",
        "wake-ups of all threads and processes of an idle pool, in a second; CPU in a second",
        by_peer(idle, peers.SUBMITTING),
        size=1000,
        quick_size=250,
        unit="wake-ups",
        scale=1,
        rounds=5,
        quick_rounds=1,
        goals=(at_most(0),),
    ),
)
