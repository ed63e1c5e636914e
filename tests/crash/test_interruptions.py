"""Ctrl-C, finalizers and callbacks at the worst moment: the pool goes on, or breaks and says so; nothing hangs."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool import _lifetime
from fdpool.fds import is_readable
from tests.contract.helpers import pid_with
from tests.crash.worker_tasks import begin, first_of
from tests.process_state import wait_until

from . import points

_STORM = """
import random, signal, sys, threading, time
from concurrent.futures import CancelledError, TimeoutError
from fdpool import Pool, PoolBroken
from tests.contract.helpers import square

def interrupt(_number, frame):
    # Only in the midst of a call of the library: what the storm itself does is not to be tested.
    while frame is not None and frame.f_code.co_name != "storm":
        if "fdpool" in frame.f_code.co_filename or "futures" in frame.f_code.co_filename:
            raise KeyboardInterrupt
        frame = frame.f_back

def storm(pool, futures, dice, ends):
    hits = 0
    while time.monotonic() < ends:
        try:
            what = dice.random()
            if what < 0.6 or not futures:
                future = pool.submit(square, 3)
                futures.append(future)
            elif what < 0.8:
                dice.choice(futures[-20:]).cancel()
            else:
                dice.choice(futures[-20:]).result(0.01)
        except KeyboardInterrupt:
            hits += 1
        except (CancelledError, TimeoutError):
            pass
        except RuntimeError as error:  # threading.Condition.wait, interrupted between release and acquire
            if isinstance(error, PoolBroken):
                assert "interrupted" in str(error), error
                break
            assert "un-acquired lock" in str(error), error
            hits += 1
    return hits

signal.signal(signal.SIGALRM, interrupt)
hits = 0
for seed in range(4):
    pool = Pool(2)
    pool.submit(square, 2).result()
    futures = []
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    hits += storm(pool, futures, random.Random(seed), time.monotonic() + 0.2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for future in futures:
        try:
            assert future.result(20) == 9
        except (CancelledError, PoolBroken):
            pass
    end = threading.Thread(target=pool.shutdown, daemon=True)
    end.start()
    end.join(20)
    assert not end.is_alive(), "shutdown hangs"
assert hits, "the storm hit nothing"
"""


def test_a_storm_of_ctrl_c_loses_no_future_and_leaves_no_lock_taken() -> None:
    """T11, T12."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", _STORM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_pool_that_is_collected_in_the_middle_of_its_own_decision_ends() -> None:
    """P14."""

    class Holder:
        pool: fdpool.Pool
        me: Any

    holder = Holder()
    holder.pool, holder.me = fdpool.Pool(1), holder
    client = holder.pool._client
    assert holder.pool.submit(os.getpid).result() > 0
    gc.disable()
    try:
        del holder
        with client.critical:  # as any allocation there may
            gc.collect()
    finally:
        gc.enable()
    wait_until(lambda: client.life.is_over)
    client.life.join()


def test_a_callback_that_exits_does_not_stop_the_pool(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def leave(_future: Future[int]) -> None:
        raise SystemExit(3)

    with fdpool.Pool(1) as pool:
        # One that was done already would have it called in this thread.
        first = pool.submit(wait_until, (tmp_path / "gate").exists)
        first.add_done_callback(leave)  # type: ignore[arg-type]
        (tmp_path / "gate").touch()
        assert pool.submit(abs, -2).result(20) == 2
    assert "exception calling callback" in caplog.text


@pytest.mark.parametrize("how", ["a task", "a chunk"])
def test_a_task_interrupted_as_it_is_about_to_be_loaded_leaves_no_descriptor_in_its_worker(
    how: str, tmp_path: Path
) -> None:
    """Its descriptors are nobody's then but the loop's. Who reads from the other end of a pipe sees its end."""
    read, write = os.pipe()
    initargs = ("while it loads", str(tmp_path))
    with open(read, "rb", buffering=0) as gate, fdpool.Pool(1, initializer=begin, initargs=initargs) as pool:
        pid = pool.submit(os.getpid).result(20)
        points.arm(tmp_path)
        with open(write, "wb") as file:
            if how == "a task":
                future: Any = pool.submit(pid_with, file)
            else:
                results = pool.map(partial(first_of, file=file), range(4), chunksize=4)
        assert points.stopped(tmp_path) == pid
        if how == "a task":
            assert future.terminate(grace=60)
        else:
            os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(CancelledError if how == "a task" else KeyboardInterrupt):
            future.result(20) if how == "a task" else next(results)
        assert is_readable(gate, 20), "the worker has the other end still"
        assert gate.read() == b""
        assert pool.submit(os.getpid).result(20) == pid


def test_signals_that_the_program_has_blocked_stay_blocked() -> None:
    seen: list[set[int]] = []

    def look(_future: Future[Any]) -> None:
        seen.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})

    mine = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, mine)
    try:
        with fdpool.Pool(1) as pool:
            future = pool.submit(time.sleep, 0.05)
            future.add_done_callback(look)
            future.cancel()
            look(future)
        look(future)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert seen == [{int(number) for number in {*before, *mine}}] * 3


def test_a_supervisor_that_does_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lifetime, "_LEAVE_S", 0.2)
    pool = fdpool.Pool(1)
    assert pool.submit(abs, -1).result() == 1
    assert pool._client.control is not None
    os.kill(pool._client.control.pid, signal.SIGSTOP)
    begun = time.monotonic()
    pool.shutdown()
    assert time.monotonic() - begun < 5
