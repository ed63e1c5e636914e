"""A client at its limit of open files, at each step of a start: a clear error, and nothing left."""

from __future__ import annotations

import errno
import os
import resource
import signal
from concurrent.futures import wait

import pytest

import fdpool
from tests.chaos.disorder import limit_with_room
from tests.contract.helpers import square
from tests.process_state import wait_until


@pytest.mark.parametrize("room", [1, 4, 6, 7, 8, 9, 10, 13, 14, 17])
def test_a_client_without_descriptors_breaks_with_a_reason_or_works(room: int) -> None:
    with fdpool.Pool(1) as pool:
        pool.submit(square, 1).result()  # whatever is imported late is, now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[object] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(room), hard))
    try:
        pool = fdpool.Pool(2)
        futures = []
        for number in range(3):
            try:
                futures.append(pool.submit(square, number))
            except fdpool.PoolBroken as error:
                outcomes.append(str(error))
        wait(futures, timeout=20)
        for future in futures:
            try:
                outcomes.append(future.result(0))
            except fdpool.PoolBroken as error:
                outcomes.append(str(error))
        pool.shutdown()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(outcomes) == 3
    for outcome in outcomes:
        if isinstance(outcome, str):
            assert os.strerror(errno.EMFILE) in outcome or "limit of open files" in outcome, outcome
            assert "defect" not in outcome
            assert "interrupted" not in outcome


def test_a_client_without_room_for_a_pidfd_hears_of_a_new_worker_all_the_same() -> None:
    """T3: a worker's start is reported with a descriptor, which the pool can do without."""
    with fdpool.Pool(2) as pool:
        gate, release = os.pipe()
        with open(gate, "rb", buffering=0) as end:
            held = pool.submit(end.__class__.read, end)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        control = pool._client.control
        assert control is not None
        os.kill(control.pid, signal.SIGSTOP)
        second = pool.submit(square, 3)
        wait_until(lambda: not control.socket.backlog)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(0), hard))
            os.kill(control.pid, signal.SIGCONT)
            assert second.result(20) == 9
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(release)
        assert held.result(20) == b""
        assert len(pool.worker_pids()) == 2
