"""What the tests of programs share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fdpool import Fd, Pool
from tests.conftest import wait_until


@contextmanager
def warm_pool(workers: int) -> Iterator[Pool]:
    """A pool whose workers are all there, so that none of them is taken for what a test left behind."""
    with Pool(workers) as pool:
        reading, writing = os.pipe()
        gates = [pool.submit(_pass, Fd(reading)) for _ in range(workers)]
        os.close(reading)
        wait_until(lambda: len(pool.worker_pids()) == workers)
        os.close(writing)
        for gate in gates:
            gate.result()
        yield pool


def _pass(gate: Fd) -> None:
    os.read(gate.fileno(), 1)
