"""Ending a program with everything that descends from it (X3, X7)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Pool, WorkerLost, wire
from fdpool.commands import CommandTimedOut
from tests.contract import helpers
from tests.contract.helpers_programs import warm_pool
from tests.process_state import living, seconds_until_gone, wait_until

# Each line of these scripts that ends with "note" leaves a process behind whose pid is in the file.
_ESCAPES = {
    "a child": "sleep 1000 & note",
    "a session of its own": "setsid sleep 1000 & note",
    "an orphan in a session of its own": "(setsid sleep 1000 & note)",
    "an orphan with no environment": "(env -i setsid sleep 1000 & note)",
    "a child that ignores TERM": "(trap '' TERM; exec sleep 1000) & note",
    "an orphan that ignores TERM": "((trap '' TERM; exec setsid sleep 1000) & note)",
    "a stopped child": "sleep 1000 & note; kill -STOP $!",
}


def script(path: Path, escape: str, then: str) -> str:
    # A shell that starts nothing more becomes its command, so `$!` is the sleeper's own pid.
    return f"note() {{ echo $! >> {path}; }}; {escape}; echo begun; {then}"


def noted(path: Path) -> list[psutil.Process]:
    return living(map(int, path.read_text().split()))


@pytest.fixture(params=["pidfd", "without pidfd"], scope="module")
def pool(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "pidfd":
            patch.setenv("FDPOOL_WITHOUT", "pidfd")
        with warm_pool(2) as pool:
            yield pool


@pytest.mark.parametrize("escape", _ESCAPES.values(), ids=list(_ESCAPES))
def test_a_deadline_ends_the_whole_tree_and_keeps_what_was_written(
    pool: Pool, tmp_path: Path, escape: str
) -> None:
    pids = tmp_path / "pids"
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    begun = time.monotonic()
    program = f"rm -f {pids}; {script(pids, escape, 'wait; sleep 1000')}"
    error = timed_out(pool, program, at_first=1.0, grace=0.2, stderr=subprocess.PIPE)
    # The sleepers hold the pipes as well: that does not hold us.
    assert time.monotonic() - begun < 60
    assert error.output == b"begun\n"
    assert isinstance(error, subprocess.TimeoutExpired)
    assert error.completed.timed_out
    assert len(pids.read_text().split()) == 1
    assert noted(pids) == []  # dead and reaped, before the future was settled
    workers = set(pool.worker_pids())
    left = {process.pid for process in psutil.Process().children(recursive=True)} - before - workers
    assert left == set()


def test_a_program_may_use_its_grace_to_finish(pool: Pool) -> None:
    code = "trap 'echo bye; exit 3' TERM; echo begun; while :; do sleep 0.01; done"
    error = timed_out(pool, code, grace=60, text=True)
    assert error.output == "begun\nbye\n"
    assert error.completed.returncode == 3
    assert error.completed.wall_s < error.timeout + 30


def has_written(error: CommandTimedOut) -> bool:
    return bool(error.output)


def timed_out(
    pool: Pool,
    program: str,
    at_first: float = 0.1,
    was_ready: Callable[[CommandTimedOut], bool] = has_written,
    **options: Any,
) -> CommandTimedOut:
    """The error of a program that has written something in its time, or that was ready in another way; its time is
    longer if it was not by then."""
    for timeout in (at_first, 5 * at_first, 25 * at_first, 125 * at_first):
        with pytest.raises(CommandTimedOut) as caught:
            pool.run(program, timeout=timeout, stdout=subprocess.PIPE, **options).result()
        if was_ready(caught.value):
            break
    return caught.value


def test_a_program_that_ignores_term_is_killed_after_its_grace(pool: Pool) -> None:
    error = timed_out(pool, "trap '' TERM; echo begun; while :; do sleep 0.01; done", grace=0.1)
    assert error.output == b"begun\n"
    assert error.completed.signal_name == "SIGKILL"


def test_no_grace_is_sigkill_at_once(pool: Pool) -> None:
    with pytest.raises(CommandTimedOut) as caught:
        pool.run("trap 'exit 3' TERM; while :; do sleep 0.01; done", timeout=0.1, grace=0).result()
    assert caught.value.completed.signal_name == "SIGKILL"


def test_a_deadline_holds_for_a_program_that_has_exited_and_left_its_pipe_to_another(
    pool: Pool, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    error = timed_out(
        pool,
        script(pids, "(setsid sleep 1000 & note)", "exit 0"),
        at_first=1.0,
        was_ready=lambda error: error.completed.returncode == 0,
        stderr=subprocess.PIPE,
    )
    assert error.output == b"begun\n"
    assert error.completed.returncode == 0
    assert noted(pids) == []


def test_a_flood_of_output_does_not_keep_a_deadline_from_its_work(pool: Pool) -> None:
    error = timed_out(pool, "trap '' TERM; yes", grace=0.2, max_output=10)
    assert error.completed.truncated
    assert error.completed.wall_s < error.timeout + 20


def test_a_worker_that_has_no_descriptor_left_for_a_program_does_not_go_on_to_adopt_orphans() -> None:
    with Pool(1, initializer=helpers.leave_no_descriptor_for_alarms) as pool:
        with pytest.raises(OSError, match="Too many open files"):
            pool.run(["true"]).result(20)
        assert not pool.submit(helpers.adopts_orphans).result(20)


def test_what_a_successful_program_leaves_running_lives_until_the_pool_ends(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with Pool(1) as pool:
        pool.run(script(pids, "(setsid sleep 1000 & note)", "exit 0")).result()
        (sleeper,) = noted(pids)
        pool.run(["true"]).result()
        assert sleeper.is_running()
    seconds_until_gone([sleeper])


def test_a_leftover_that_dies_is_reaped_by_the_next_program(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with Pool(1) as pool:
        pool.run(script(pids, "(setsid sleep 1000 & note)", "exit 0")).result()
        (sleeper,) = noted(pids)
        sleeper.kill()
        wait_until(lambda: sleeper.status() == psutil.STATUS_ZOMBIE)
        pool.run(["true"]).result()
        assert not psutil.pid_exists(sleeper.pid)


@pytest.mark.parametrize(
    "escape", ["sleep 1000 & note", "setsid sleep 1000 & note", "(setsid sleep 1000 & note)"]
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_takes_its_program_along_even_with_an_empty_environment(
    tmp_path: Path, escape: str, number: int
) -> None:
    pids = tmp_path / "pids"
    with Pool(1) as pool:
        path = os.environ["PATH"]
        text = script(pids, escape, f"echo $$ >> {pids}; sleep 1000; wait")
        future = pool.run(f"PATH={path}; {text}", env={}, new_session=True, stdout=subprocess.DEVNULL)
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        processes = noted(pids)
        os.kill(pool.worker_pids()[0], number)
        with pytest.raises(WorkerLost):
            future.result()
        seconds_until_gone(processes)


def test_a_child_of_an_earlier_task_is_not_taken_for_the_programs() -> None:
    with Pool(1) as pool:
        # Kept where the worker's other tasks find it; a function that travels by value has its own globals.
        def start() -> int:
            sys.sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # type: ignore[attr-defined]
            return sys.sleeper.pid

        def status() -> object:
            return sys.sleeper.poll()

        def end() -> int:
            sys.sleeper.kill()
            return sys.sleeper.wait()

        pid = pool.submit(start).result()
        with pytest.raises(CommandTimedOut):
            pool.run(["sleep", "1000"], timeout=0.05, grace=0).result()
        assert psutil.Process(pid).is_running()
        assert pool.submit(status).result() is None
        assert pool.submit(end).result() == -signal.SIGKILL


def test_ctrl_c_in_the_worker_ends_the_program(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with Pool(1) as pool:
        future = pool.run(script(pids, "setsid sleep 1000 & note", "wait"))
        wait_until(lambda: pids.exists() and pids.read_text())
        os.kill(pool.worker_pids()[0], signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            future.result()
        assert noted(pids) == []
        assert pool.run(["true"]).result().returncode == 0


def test_killing_the_pool_ends_the_program(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with Pool(1) as pool:
        pool.run(script(pids, "(env -i setsid sleep 1000 & note)", "wait; sleep 1000"))
        wait_until(lambda: pids.exists() and pids.read_text())
        (sleeper,) = noted(pids)
        pool.kill_workers()
    seconds_until_gone([sleeper])


def test_cancelling_the_future_of_a_running_program_ends_its_tree(pool: Pool, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    future = pool.run(script(pids, "(env -i setsid sleep 1000 & note)", "sleep 1000; :"), grace=0.1)
    wait_until(lambda: pids.exists() and pids.read_text())
    (sleeper,) = noted(pids)
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()
    seconds_until_gone([sleeper])


def test_a_cancelled_program_ends_alone_and_its_worker_goes_on(tmp_path: Path) -> None:
    with warm_pool(1) as pool:
        worker = pool.worker_pids()
        for _ in range(20):
            first = pool.run(["sleep", "1000"], grace=0)
            second = pool.run(["echo", "second"], stdout=subprocess.PIPE)
            wait_until(first.running)
            assert first.cancel()
            assert second.result().stdout == b"second\n"
        assert pool.worker_pids() == worker


def test_programs_that_are_cancelled_and_cannot_be_taken_back_are_stopped_as_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one word in which a worker is told what to stop."""

    def no_room(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with warm_pool(1) as pool, open(os.devnull) as null:
        gate = tmp_path / "gate"
        running = pool.submit(wait_until, gate.exists)
        wait_until(running.running)
        programs = [pool.run(f"sleep 30; touch {tmp_path / name}", stdin=null, grace=0) for name in "abc"]
        with monkeypatch.context() as full:
            full.setattr(wire, "try_take", no_room)
            assert all(program.cancel() for program in programs)
            gate.touch()
            running.result(timeout=20)
            assert pool.submit(int).result(timeout=20) == 0
    assert not list(tmp_path.glob("[abc]"))


def test_a_task_that_is_to_end_next_takes_no_word_from_a_program_that_is_to_stop_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were given to one worker, and it has not looked yet."""

    def no_room(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    reading, writing = os.pipe()
    with warm_pool(1) as pool, open(reading) as gate, open(writing, "w"):
        program = pool.run(["sleep", "1000"], grace=0)
        following = pool.submit(helpers.touch_and_wait, str(tmp_path / "begun"), gate)
        wait_until(program.running)
        worker = psutil.Process(pool.worker_pids()[0])
        wait_until(worker.children)
        [sleeper] = worker.children()
        with monkeypatch.context() as full:
            full.setattr(wire, "try_take", no_room)
            worker.suspend()
            assert program.cancel()
            assert following.terminate(grace=10)
            worker.resume()
            try:
                seconds_until_gone([sleeper])
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    sleeper.kill()  # or the pool would wait for it
            with pytest.raises(CancelledError):
                following.result(timeout=5)
        assert pool.worker_pids() == [worker.pid]


def test_a_program_that_ends_before_its_cancel_returns_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with warm_pool(1) as pool:
        client = pool._client
        stop = client.stop

        def stop_and_see_it_end(task: int) -> bool:
            stopped = stop(task)
            wait_until(future.done)
            return stopped

        monkeypatch.setattr(client, "stop", stop_and_see_it_end)
        future = pool.run(["sleep", "1000"], grace=0)
        wait_until(future.running)
        assert future.cancel()
        assert future.cancelled()


def test_a_program_that_has_ended_cannot_be_cancelled(pool: Pool) -> None:
    future = pool.run(["true"])
    future.result()
    assert not future.cancel()


def test_cancelling_whatever_runs_at_any_moment_disturbs_no_other_program(pool: Pool) -> None:
    futures = [pool.run(["true"]) for _ in range(100)]
    cancelled = [future for future in futures[::2] if future.cancel()]
    for future in futures:
        assert future in cancelled or future.result().returncode == 0
    assert all(future.cancelled() for future in cancelled)


def test_shutdown_lets_running_programs_finish_also_when_it_cancels_what_waits() -> None:
    with Pool(1) as pool:
        reading, writing = os.pipe()
        first = pool.run("read line; echo $line", stdin=reading, stdout=subprocess.PIPE)
        os.close(reading)
        wait_until(first.running)
        second = pool.run(["true"])
        pool.shutdown(wait=False, cancel_futures=True)
        assert second.cancelled()
        os.write(writing, b"finished\n")
        os.close(writing)
        assert first.result().stdout == b"finished\n"


def test_an_awaited_program_is_ended_with_its_awaiter(pool: Pool, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def main() -> None:
        command = pool.run(script(pids, "sleep 1000 & note", "wait"), grace=0.1)
        awaited = asyncio.wrap_future(command)
        await asyncio.to_thread(wait_until, lambda: pids.exists() and pids.read_text())
        await asyncio.wait_for(awaited, 0.01)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())
    seconds_until_gone(noted(pids))
