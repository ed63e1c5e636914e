"""Pools and servers where a test stops the clock of its own process, or has done so before they are made."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

from fdpool import Pool, TaskTimeout
from fdpool.server import Server
from tests.contract import helpers
from tests.process_state import wait_until
from tests.server.applications import echo_pid
from tests.server.helpers import ANY_PORT, ask

freezegun = pytest.importorskip("freezegun")


@pytest.fixture
def frozen() -> Iterator[Any]:
    """To be entered: whatever has a name for a function of `time` has a frozen one in its place."""
    return freezegun.freeze_time("2001-02-03 04:05:06")


def test_deadlines_are_over_and_results_come_while_the_clock_is_stopped(frozen: Any) -> None:
    with Pool(2) as pool:
        assert pool.submit(helpers.square, 3).result() == 9
        with frozen:
            assert datetime.now(timezone.utc).year == 2001
            late = pool.with_options(timeout=0.05, grace=0).submit(time.sleep, 1000)
            with pytest.raises(TaskTimeout):
                late.result()
            assert list(pool.map(helpers.square, range(100))) == [n * n for n in range(100)]
            # No worker is taken for overdue as the clock has leapt.
            assert pool.with_options(timeout=1000).submit(helpers.square, 4).result() == 16
        assert pool.submit(helpers.square, 5).result() == 25
        assert pool.stats().lost_workers == 1


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_a_server_goes_on_where_the_clock_is_stopped(frozen: Any, dispatch: Any) -> None:
    with Server(echo_pid, ANY_PORT, workers=1, dispatch=dispatch, request_timeout=30) as server:
        pid, _ = ask(server)
        with frozen:
            assert ask(server) == (pid, b"hello")
            server.scale(2)
            wait_until(lambda: len(server.stats().workers) == 2)
        assert ask(server)[1] == b"hello"


def test_what_is_imported_where_the_clock_is_stopped_already_has_the_kernels() -> None:
    program = """
import time
from freezegun import freeze_time
real = time.clock_gettime
with freeze_time("2001-02-03"):
    import fdpool
    with fdpool.Pool(1) as pool:
        try:
            pool.with_options(timeout=0.05, grace=0).submit(time.sleep, 1000).result()
        except fdpool.TaskTimeout:
            print("timed out")
    from fdpool._clock import CLOCK
    print(abs(CLOCK.monotonic() - real(time.CLOCK_MONOTONIC)) < 60, CLOCK.monotonic_ns() // 10**9 > 0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["timed out", "True True"], done.stderr
