"""A client at its limit of open files, at each step of a start: a clear error, and nothing left."""

from __future__ import annotations

import errno
import os
import resource
from concurrent.futures import wait

import pytest

import fdpool
from tests.contract.helpers import square
from tests.process_state import open_descriptors


def _highest_free(room: int) -> int:
    """The limit of open files at which exactly `room` more can be opened."""
    taken = set(open_descriptors())
    number = 0
    while room or number in taken:
        room -= number not in taken
        number += 1
    return number


@pytest.mark.parametrize("room", [1, 4, 6, 7, 8, 9, 10, 13, 14, 17])
def test_a_client_without_descriptors_breaks_with_a_reason_or_works(room: int) -> None:
    with fdpool.Pool(1) as pool:
        pool.submit(square, 1).result()  # whatever is imported late is, now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[object] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (_highest_free(room), hard))
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
