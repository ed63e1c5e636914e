"""Cancelling tasks, and every way in which a pool can end."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import gc
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

import fdpool
from fdpool import Pool
from fdpool.fds import is_readable
from tests.process_state import seconds_until_gone, wait_until

from . import helpers


class Gate:
    """A task that runs until it is let go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._writers: list[IO[bytes]] = []

    def hold(self, pool: Pool) -> cf.Future[str]:
        """Submit a task that says that it runs; return when it does."""
        self._count += 1
        path = self._folder / f"runs-{self._count}"
        read, write = os.pipe()
        self._writers.append(open(write, "wb"))
        with open(read, "rb") as gate:
            future = pool.submit(helpers.touch_and_wait, str(path), gate)
        wait_until(path.exists)
        return future

    def open(self) -> None:
        while self._writers:
            self._writers.pop().close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.open()


def test_a_cancelled_task_never_starts(gate: Gate, tmp_path: Path) -> None:
    """P9: queued, sent but not begun, running, finished."""
    with Pool(1) as pool:
        running = gate.hold(pool)
        sent = [pool.submit(Path.touch, tmp_path / f"sent-{n}") for n in range(5)]
        queued = [pool.submit(Path.touch, tmp_path / f"queued-{n}") for n in range(40)]
        assert not running.cancel()
        assert running.running()
        assert not sent[0].running()
        assert sent[1].cancel()
        assert sent[1].cancelled()
        assert queued[-1].cancel()
        done, _ = cf.wait([sent[1], queued[-1]], timeout=5)
        assert len(done) == 2
        gate.open()
        assert running.result() == str(tmp_path / "runs-1")
        assert not running.cancel()
        cf.wait([*sent, *queued])
    assert not (tmp_path / "sent-1").exists()
    assert not (tmp_path / "queued-39").exists()
    assert (tmp_path / "sent-4").exists()


def test_a_task_that_was_sent_and_not_received_is_not_running_and_can_be_cancelled() -> None:
    with Pool(1) as pool:
        pool.submit(int).result()
        [worker] = pool.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED)
        try:
            first, second = pool.submit(os.getpid), pool.submit(os.getpid)
            assert not first.running()
            assert first.cancel()
        finally:
            os.kill(worker, signal.SIGCONT)
        assert second.result(timeout=20) == worker


def test_tasks_behind_a_cancelled_one_keep_their_order(gate: Gate) -> None:
    with Pool(1) as pool:
        gate.hold(pool)
        read, write = os.pipe()
        with open(write, "wb", buffering=0) as log:
            futures = [pool.submit(lambda f, n: f.write(bytes([n])), log, n) for n in range(10)]
        assert futures[3].cancel()
        gate.open()
        cf.wait(futures)
        with open(read, "rb") as result:
            assert result.read() == bytes([0, 1, 2, 4, 5, 6, 7, 8, 9])


def test_a_cancelled_task_gives_its_descriptors_back(gate: Gate) -> None:
    """P9."""
    with Pool(1) as pool:
        gate.hold(pool)
        read, write = os.pipe()
        with open(write, "wb") as end:
            future = pool.submit(helpers.read_all, end)
        assert future.cancel()
        with open(read, "rb") as other:
            assert other.read() == b""  # nobody holds the writing end any more
        gate.open()


def test_shutdown_finishes_what_was_submitted() -> None:
    pool = Pool(2)
    futures = [pool.submit(helpers.square, n) for n in range(200)]
    pool.shutdown(wait=False)
    assert [future.result() for future in futures] == [n * n for n in range(200)]
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(helpers.square, 1)


def test_shutdown_can_cancel_what_has_not_begun(gate: Gate) -> None:
    pool = Pool(1)
    running = gate.hold(pool)
    waiting = [pool.submit(helpers.square, n) for n in range(50)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    gate.open()
    assert running.result()
    pool.shutdown()


def test_an_unused_pool_ends_at_once() -> None:
    pool = Pool(2)
    pool.shutdown()
    pool.shutdown()
    with pytest.raises(fdpool.PoolShutDown):
        pool.submit(helpers.square, 1)


def test_a_dropped_pool_finishes_its_tasks_and_goes() -> None:
    """P12."""
    pool = Pool(2)
    results = pool.map(helpers.square, range(50))
    future = pool.submit(helpers.square, 7)
    pids = pool.worker_pids()
    del pool
    gc.collect()
    assert list(results) == [n * n for n in range(50)]
    assert future.result() == 49
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_kill_workers_ends_running_tasks_and_what_they_started(gate: Gate) -> None:
    pool = Pool(2)
    gate.hold(pool)
    below = pool.submit(lambda: subprocess.Popen(["sleep", "1000"]).pid).result()
    running = [gate.hold(pool)]
    waiting = [pool.submit(helpers.square, n) for n in range(40)]
    pool.kill_workers()
    for future in running:
        with pytest.raises(fdpool.PoolBroken, match="kill_workers"):
            future.result(timeout=10)
    assert all(future.cancelled() for future in waiting[1:])
    pool.shutdown()
    assert not psutil.pid_exists(below)


def test_terminate_workers_lets_a_program_end_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    # Waited for, not handled: a shell loses a signal that comes while it starts a program, and a handler of Python's
    # one that comes just before pause(2).
    script = f"""
import pathlib, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
pathlib.Path({str(mark)!r}).write_text("bye\\n")
"""
    pool = Pool(1)
    read, write = os.pipe()
    with open(write, "wb") as end:
        future = pool.run([sys.executable, "-c", script], stdout=end)
    with open(read, "rb") as lines:
        assert lines.readline() == b"ready\n"
    end = pool._client.life.end
    # A busy machine does less in a second.
    monkeypatch.setattr(pool._client.life, "end", lambda grace_s, reason: end(30 * grace_s, reason))
    pool.terminate_workers()
    pool.shutdown()
    assert mark.read_text() == "bye\n"
    with pytest.raises(fdpool.PoolBroken):
        future.result()


def test_shutdown_leaves_nothing_that_a_task_started() -> None:
    """P8."""
    with Pool(1) as pool:
        one = pool.submit(lambda: subprocess.Popen(["sleep", "1000"]).pid).result()
        other = pool.submit(lambda: subprocess.Popen(["sleep", "1000"], start_new_session=True).pid).result()
    assert not psutil.pid_exists(one)
    assert not psutil.pid_exists(other)


def run_script(source: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of its own, as a user would."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_interpreter_exit_finishes_pending_work() -> None:
    """P12."""
    done = run_script(
        """
        import sys, fdpool
        pool = fdpool.Pool(1)
        for n in range(20):
            pool.submit(lambda n=n: (print(n), sys.stdout.flush()))
        """
    )
    assert done.stdout.split() == [str(n) for n in range(20)]
    assert (done.stderr, done.returncode) == ("", 0)


def test_submitting_while_the_interpreter_exits_is_refused() -> None:
    done = run_script(
        """
        import atexit, fdpool
        pool = fdpool.Pool(1)
        @atexit.register
        def late():
            try:
                pool.submit(print)
            except RuntimeError as error:
                print(error)
        pool.submit(abs, 1).result()
        """
    )
    assert "after interpreter shutdown" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.usefixtures("heeding_the_terminal")
@pytest.mark.parametrize("block", [True, False])
def test_ctrl_c_ends_everything_at_once_with_one_traceback(block: bool, tmp_path: Path) -> None:
    source = f"""
        import time, fdpool
        def main(pool):
            futures = [pool.submit(time.sleep, 1000) for _ in range(8)]
            print("ready", pool.submit, flush=True)
            futures[0].result()
        if {block}:
            with fdpool.Pool(2) as pool:
                main(pool)
        else:
            main(fdpool.Pool(2))
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        program.stdout.readline()
        client = psutil.Process(program.pid)
        wait_until(lambda: len(client.children(recursive=True)) == 3)
        tree = client.children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: the foreground group
        _, errors = program.communicate(timeout=30)
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(process.is_running() for process in tree)


PROMPT = b">>> "
INTERPRETER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-q", "-i", "-W", "error"])
"""


HOLDING = """
import pathlib, time

def hold():
    pathlib.Path("runs").touch()
    try:
        time.sleep(1000)
    finally:
        pathlib.Path("interrupted").touch()
"""


class Terminal:
    """An interactive interpreter on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self._own, end = pty.openpty()
        # The prompt is the interpreter's own, also where a newer one would draw it.
        env = {**os.environ, "PYTHONPATH": os.getcwd(), "TERM": "dumb", "PYTHON_BASIC_REPL": "1"}
        self.program = subprocess.Popen(
            [sys.executable, "-c", INTERPRETER],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            cwd=folder,
            env=env,
        )
        os.close(end)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def read_until(self, wanted: bytes, limit_s: float = 20.0) -> bytes:
        """What is on the terminal up to there."""
        seen = b""
        deadline = time.monotonic() + limit_s
        while not seen.endswith(wanted):
            assert is_readable(self._own, max(0.0, deadline - time.monotonic())), seen
            seen += os.read(self._own, 1)
        return seen

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._own)


@pytest.mark.usefixtures("heeding_the_terminal")
def test_ctrl_c_at_a_prompt_brings_it_back_with_one_traceback_and_the_pool_goes_on(tmp_path: Path) -> None:
    """Its workers are no part of the terminal's foreground: what they run is not interrupted."""
    (tmp_path / "holding.py").write_text(HOLDING)
    terminal = Terminal(tmp_path)
    try:
        terminal.read_until(PROMPT)
        terminal.type("import fdpool, holding; pool = fdpool.Pool(2)\n")
        terminal.read_until(PROMPT)
        terminal.type("pool.submit(holding.hold).result()\n")
        wait_until((tmp_path / "runs").exists)
        terminal.type("\x03")
        seen = terminal.read_until(PROMPT)
        assert seen.count(b"Traceback") == 1, seen
        assert seen.rstrip(b" >\r\n").endswith(b"KeyboardInterrupt"), seen
        terminal.type("[pool.submit(pow, n, 2).result() for n in range(5)]\n")
        assert b"[0, 1, 4, 9, 16]" in terminal.read_until(PROMPT)
        tree = psutil.Process(terminal.program.pid).children(recursive=True)
        terminal.type("pool.kill_workers(); exit()\n")
        assert terminal.program.wait(20) == 0
        seconds_until_gone(tree)
        assert not (tmp_path / "interrupted").exists()
    finally:
        terminal.close()


ASYNCIO = """
import asyncio, os, signal, subprocess, sys, time, fdpool

def hold():
    sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os.write(1, b"holds\\n")  # one call: print makes two where Python does not buffer
    sleeper.wait()

async def main(pool):
    await asyncio.gather(*(pool.submit(hold) for _ in range(4)))

with fdpool.Pool(2) as pool:
    asyncio.run(main(pool))
"""

BLOCKING = (
    ASYNCIO.partition("async def")[0]
    + """
with fdpool.Pool(2) as pool:
    pool.submit(hold)
    pool.submit(hold).result()
"""
)


@contextlib.contextmanager
def holding(source: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A program whose two workers run something, and all that descends from it."""
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout is not None
            assert [program.stdout.readline() for _ in range(2)] == ["holds\n"] * 2
            tree = psutil.Process(program.pid).children(recursive=True)
            assert len(tree) == 5  # the supervisor, two workers, and what each has started
            yield program, tree
        finally:
            program.kill()


@pytest.mark.usefixtures("heeding_the_terminal")
def test_ctrl_c_in_an_event_loop_ends_everything_at_once() -> None:
    with holding(ASYNCIO) as (program, tree):
        os.killpg(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        seconds_until_gone(tree)
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("source", [ASYNCIO, BLOCKING], ids=["asyncio", "blocking"])
def test_a_program_ended_by_sigterm_takes_everything_along(source: str) -> None:
    """Python does not handle it, so none of the program's own code gets to see to that."""
    with holding(source) as (program, tree):
        program.terminate()
        assert program.wait(30) == -signal.SIGTERM
        seconds_until_gone(tree)


def test_used_in_a_forked_child_the_pool_refuses_and_the_parent_does_not_notice() -> None:
    """P11."""
    with Pool(2) as pool:
        assert pool.submit(helpers.square, 2).result() == 4
        read, write = os.pipe()
        pid = os.fork() if threading.active_count() == 1 else _fork_quietly()
        if pid == 0:
            try:
                pool.submit(helpers.square, 3)
                text = "submitted"
            except fdpool.ForkedPool as error:
                text = str(error)
            pool.shutdown()
            sockets = [name for name in helpers.open_numbers().values() if "eventpoll" in name]
            os.write(write, f"{text}|{len(sockets)}".encode())
            os._exit(0)
        os.close(write)
        with open(read) as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        assert text == (
            "this pool belongs to the process that made it, and this is a forked child of that: "
            "make a new Pool here|0"
        )
        assert pool.submit(helpers.square, 3).result() == 9


def test_a_forked_child_leaves_the_block_of_a_view_at_once_and_the_parents_tasks_alone(gate: Gate) -> None:
    """P11."""
    with Pool(1) as pool, pool.with_options(timeout=60) as view:
        gate.hold(pool)
        waiting = view.submit(helpers.square, 3)
        read, write = os.pipe()
        pid = _fork_quietly()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            view.shutdown()
            view.shutdown(cancel_futures=True)
            view.__exit__(KeyboardInterrupt)
            os.write(write, b"left")
            os._exit(0)
        os.close(write)
        with open(read) as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        gate.open()
        assert text == "left"
        assert waiting.result() == 9


def test_a_forked_child_holds_nothing_of_what_queued_tasks_carry(gate: Gate) -> None:
    read, write = os.pipe()
    with Pool(1) as pool:
        gate.hold(pool)
        for n in range(20):
            pool.submit(helpers.square, n)  # more than one worker is given
        with open(write, "wb") as end, open(read, "rb") as other:
            target = os.readlink(f"/proc/self/fd/{read}")
            futures = [pool.submit(helpers.read_all, other), pool.submit(len, b"x" * 1_000_000)]
            end.close()
        report, told = os.pipe()
        pid = _fork_quietly()
        if pid == 0:
            held = [name for name in helpers.open_numbers().values() if name == target or "memfd" in name]
            os.write(told, f"{held}".encode())
            os._exit(0)
        os.close(told)
        with open(report) as answer:
            assert answer.read() == "[]"
        os.waitpid(pid, 0)
        with Pool(1, start_method="fork") as second:
            assert target not in second.submit(helpers.open_numbers).result().values()
        gate.open()
        assert [future.result() for future in futures] == [b"", 1_000_000]


def test_who_waits_for_a_result_in_a_forked_child_is_told_that_it_will_not_come(gate: Gate) -> None:
    with Pool(1) as pool:
        futures = [pool.submit(helpers.square, 2), gate.hold(pool)]
        assert futures[0].result() == 4
        read, write = os.pipe()
        pid = _fork_quietly()
        if pid == 0:
            signal.alarm(20)
            said = [f"{futures[0].result()}"]
            for wait in (futures[1].result, futures[1].exception, lambda: futures[1].result(10)):
                try:
                    said.append(f"{wait()}")
                except Exception as error:
                    said.append(type(error).__name__)
            os.write(write, " ".join(said).encode())
            os._exit(0)
        os.close(write)
        with open(read) as answer:
            assert answer.read() == "4 ForkedPool ForkedPool ForkedPool"
        os.waitpid(pid, 0)
        gate.open()
        futures[1].result()


def _fork_quietly() -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def test_many_pools_in_a_row_leave_nothing() -> None:
    for n in range(10):
        with Pool(2) as pool:
            assert pool.submit(helpers.square, n).result() == n * n
