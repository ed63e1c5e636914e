"""`Pool.popen`: the handle of a program that runs in a worker."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Pool, RunningCommand, TaskTimeout, WorkerLost
from fdpool.commands import CommandTimedOut, SpawnError
from tests.conftest import open_descriptors, seconds_until_gone, wait_until
from tests.contract.helpers_programs import warm_pool

PIPE = subprocess.PIPE


@pytest.fixture(params=["pidfd", "without pidfd"], scope="module")
def pool(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "pidfd":
            patch.setenv("FDPOOL_WITHOUT", "pidfd")
        with warm_pool(2) as pool:
            yield pool


@pytest.fixture
def with_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start meanwhile have pidfds, whichever pool of this module is there."""
    monkeypatch.delenv("FDPOOL_WITHOUT", raising=False)


def is_broken(pipe: Any) -> bool:
    """True once nobody can read from the other end."""
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def pidfds() -> list[str]:
    return [target for target in open_descriptors().values() if "pidfd" in target]


def fill(pipe: Any) -> None:
    """Write into a program's stdin until there is no more room, and one byte more that stays in the file's buffer."""
    os.write(pipe.fileno(), b"x" * fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ))
    pipe.write("y" if isinstance(pipe, io.TextIOBase) else b"y")


def is_waiting_in(thread: threading.Thread, pipe: Any) -> bool:
    """True once the thread is in a system call on the pipe that does not return."""
    call = (
        Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()
    )  # proc(5): its number, arguments
    return call[1:2] == [hex(pipe.fileno())]


def test_one_talks_to_a_program_over_its_pipes(pool: Pool) -> None:
    with pool.popen(["cat"], stdin=PIPE, stdout=PIPE) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(b"hello\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == b"hello\n"
        assert cat.poll() is None
        cat.stdin.close()
        assert cat.wait() == 0
        assert cat.returncode == 0


def test_pipes_may_be_text(pool: Pool) -> None:
    with pool.popen("cat; echo done >&2", stdin=PIPE, stdout=PIPE, stderr=PIPE, encoding="utf-8") as shell:
        assert shell.stdin is not None
        shell.stdin.write("ä\n")
        shell.stdin.close()
        assert shell.stdout is not None
        assert shell.stderr is not None
        assert (shell.stdout.read(), shell.stderr.read()) == ("ä\n", "done\n")


def test_the_pid_is_the_programs_while_it_runs(pool: Pool) -> None:
    with pool.popen(["sleep", "1000"]) as sleeper:
        # What waits for its execve(2) is let go on before that has given it its name.
        wait_until(lambda: psutil.Process(sleeper.pid).name() == "sleep")
        assert psutil.Process(sleeper.pid).ppid() in pool.worker_pids()
        sleeper.terminate()
        assert sleeper.wait() == -signal.SIGTERM
        assert sleeper.future.result().signal_name == "SIGTERM"
        assert sleeper.pid


def test_signals_reach_the_program_and_no_other(pool: Pool) -> None:
    script = "trap 'echo usr1' USR1; trap 'exit 7' INT; echo ready; while :; do sleep 0.01; done"
    with pool.popen(script, stdout=PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.send_signal(signal.SIGUSR1)
        assert shell.stdout.readline() == "usr1\n"
        shell.signal_group(signal.SIGINT)
        assert shell.wait() == 7
        shell.send_signal(signal.SIGKILL)  # to nobody


def test_a_signal_after_the_end_goes_to_nobody(pool: Pool) -> None:
    with pool.popen(["true"]) as done:
        pid = done.pid
        done.wait()
        assert not psutil.pid_exists(pid)
        done.kill()
        done.signal_group(signal.SIGKILL)
        done.end()


def test_a_program_that_cannot_be_started_says_so_wherever_one_asks(pool: Pool) -> None:
    with pool.popen(["no-such-program"], stdout=PIPE) as missing:
        with pytest.raises(SpawnError):
            missing.pid
        with pytest.raises(SpawnError):
            missing.wait()
        with pytest.raises(SpawnError):
            missing.send_signal(signal.SIGTERM)
        assert missing.stdout is not None
        assert missing.stdout.read() == b""


def test_waiting_may_be_limited(pool: Pool) -> None:
    with pool.popen(["sleep", "1000"]) as sleeper:
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.wait(0.01)
        sleeper.kill()
        assert sleeper.wait(10) == -signal.SIGKILL


def test_a_deadline_holds_for_it_too(pool: Pool) -> None:
    with pool.popen(["sleep", "1000"], timeout=0.1, grace=0) as sleeper:
        with pytest.raises(CommandTimedOut):
            sleeper.wait()


def test_end_ends_the_whole_tree(pool: Pool, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pool.popen(f"(setsid sleep 1000 & echo $! > {pids}); sleep 1000; :", stdout=PIPE) as shell:
        wait_until(lambda: pids.exists() and pids.read_text())
        process = psutil.Process(int(pids.read_text()))
        shell.end(grace=20)  # as a shell that is just starting a program has SIGTERM blocked
        assert shell.wait() == -signal.SIGTERM
        assert not process.is_running()


@pytest.mark.parametrize("grace", [float("inf"), float("nan"), -1])
def test_what_is_no_time_to_end_in_is_refused_at_once(pool: Pool, grace: float) -> None:
    with pool.popen(["sleep", "1000"], timeout=10) as sleeper:
        with pytest.raises(ValueError, match="grace must be a finite number of seconds"):
            sleeper.end(grace=grace)
        sleeper.kill()
        assert sleeper.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [2**40, signal.NSIG, -1])
def test_what_is_no_signal_is_refused_at_once(pool: Pool, number: int) -> None:
    with pool.popen(["sleep", "1000"], timeout=10) as sleeper:
        for send in (sleeper.send_signal, sleeper.signal_group):
            with pytest.raises(ValueError, match=f"cannot send signal {number}: it must be in 0..64"):
                send(number)
        sleeper.kill()
        assert sleeper.wait() == -signal.SIGKILL


def test_a_program_whose_handle_is_dropped_is_ended(pool: Pool) -> None:
    sleeper = pool.popen(["sleep", "1000"], grace=0.1)
    process, future = psutil.Process(sleeper.pid), sleeper.future
    sleeper.close()
    future.result()
    assert not process.is_running()


@pytest.mark.parametrize("text", [False, True])
def test_closing_does_not_wait_for_a_program_that_does_not_read(pool: Pool, text: bool) -> None:
    script = "trap '' TERM; echo; exec sleep 1000"
    sleeper = pool.popen(script, stdin=PIPE, stdout=PIPE, text=text, timeout=10, grace=10)
    assert sleeper.stdin is not None
    assert sleeper.stdout is not None
    sleeper.stdout.readline()
    process = psutil.Process(sleeper.pid)
    fill(sleeper.stdin)
    sleeper.close()
    assert process.is_running()
    assert sleeper.stdin.closed
    sleeper.close()
    process.kill()
    assert sleeper.wait() == -signal.SIGKILL


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # in development mode: EPIPE, of stdin
def test_a_program_that_does_not_read_is_ended_as_its_handle_is_dropped(pool: Pool) -> None:
    sleeper = pool.popen(["sleep", "1000"], stdin=PIPE, timeout=10)
    future = sleeper.future
    fill(sleeper.stdin)
    with pytest.warns(ResourceWarning):
        del sleeper
    assert future.result().returncode == -signal.SIGTERM


def test_what_is_buffered_for_a_program_still_reaches_it_as_it_is_closed(pool: Pool, tmp_path: Path) -> None:
    script = f"trap '' TERM; echo; exec cat > {tmp_path}/read"
    cat = pool.popen(script, stdin=PIPE, stdout=PIPE, grace=10)
    assert cat.stdin is not None
    assert cat.stdout is not None
    cat.stdout.readline()
    cat.stdin.write(b"last words")
    cat.close()
    assert cat.wait() == 0
    assert (tmp_path / "read").read_bytes() == b"last words"


def test_closing_ends_a_program_that_another_thread_writes_to(pool: Pool) -> None:
    sleeper = pool.popen(["sleep", "1000"], stdin=PIPE, timeout=10)
    assert sleeper.stdin is not None
    fill(sleeper.stdin)

    def write() -> None:
        with pytest.raises(BrokenPipeError):
            sleeper.stdin.flush()

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: is_waiting_in(thread, sleeper.stdin))
    sleeper.close()
    thread.join()
    assert sleeper.wait() == -signal.SIGTERM


def test_an_error_in_the_block_ends_the_program(pool: Pool) -> None:
    with pytest.raises(LookupError), pool.popen(["sleep", "1000"]) as sleeper:
        process = psutil.Process(sleeper.pid)
        raise LookupError
    assert not process.is_running()


def test_the_block_ends_though_the_program_closed_its_stdin(pool: Pool) -> None:
    script = "exec 0<&-; echo ready; exec yes"
    with pool.popen(script, stdin=PIPE, stdout=PIPE, timeout=10) as yes:
        assert yes.stdin is not None
        assert yes.stdout is not None
        assert yes.stdout.readline() == b"ready\n"
        wait_until(lambda: is_broken(yes.stdin))
        yes.stdin.write(b"never read")
    assert yes.wait() == -signal.SIGPIPE


def test_the_block_ends_though_the_program_writes_before_it_reads(pool: Pool) -> None:
    script = "head -c 1000000 /dev/zero; exec cat > /dev/null"
    with pool.popen(script, stdin=PIPE, stdout=PIPE, timeout=10) as writer:
        fill(writer.stdin)
    assert writer.wait() == 0


def test_one_that_waits_for_a_worker_can_be_ended(tmp_path: Path) -> None:
    with warm_pool(1) as pool, pool.popen(["cat"], stdin=PIPE) as cat:
        cat.pid
        with pool.popen(["touch", tmp_path / "made"]) as waiting:
            waiting.end()
            with pytest.raises(CancelledError):
                waiting.pid
            with pytest.raises(CancelledError):
                waiting.wait()
        cat.kill()
    assert not (tmp_path / "made").exists()


def test_a_killed_worker_takes_the_program_along_and_the_handle_says_so() -> None:
    with Pool(1) as pool, pool.popen(["sleep", "1000"], env={}) as sleeper:
        process = psutil.Process(sleeper.pid)
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(WorkerLost):
            sleeper.wait()
        seconds_until_gone([process])
        sleeper.send_signal(signal.SIGTERM)


@pytest.mark.usefixtures("with_pidfds")
def test_a_program_that_is_started_again_is_the_one_that_is_meant() -> None:
    with Pool(1) as pool, pool.with_options(retries=1, retry_delay=0).popen(["sleep", "1000"]) as sleeper:
        first = sleeper.pid
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: sleeper.pid != first)
        assert psutil.Process(sleeper.pid).ppid() in pool.worker_pids()
        sleeper.terminate()
        assert sleeper.wait(10) == -signal.SIGTERM


@pytest.mark.usefixtures("with_pidfds")
def test_a_signal_between_two_starts_reaches_the_second() -> None:
    with Pool(1) as pool, pool.with_options(retries=1, retry_delay=0.5).popen(["sleep", "1000"]) as sleeper:
        process = psutil.Process(sleeper.pid)
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        seconds_until_gone([process])
        sleeper.kill()
        assert sleeper.wait(10) == -signal.SIGKILL


def test_without_a_free_descriptor_it_has_a_pid_and_takes_signals() -> None:
    """In a process of its own, in which nothing else has loaded what that takes."""
    script = """if True:
        import os, resource, subprocess, fdpool

        args, options = "echo; exec sleep 1000", {"stdout": subprocess.PIPE, "timeout": 10}
        with fdpool.Pool(1) as pool, pool.popen(args, **options) as sleeper:
            sleeper.stdout.readline()
            free = os.dup(0)
            os.close(free)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            sleeper.kill()
            assert sleeper.pid
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert sleeper.wait() == -9
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_handle_that_is_dropped_closes_what_it_had_of_the_process(pool: Pool) -> None:
    before = pidfds()
    done = pool.popen(["true"])
    done.pid
    done.wait()
    done.kill()
    with pytest.warns(ResourceWarning):  # of its leash
        del done
    assert pidfds() == before


def test_its_pid_may_be_asked_for_by_many_threads(pool: Pool) -> None:
    with pool.popen(["sleep", "1000"]) as sleeper:
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(sleeper.pid)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {sleeper.pid}
        sleeper.kill()


@pytest.fixture
def forked_pool() -> Iterator[Pool]:
    with Pool(1, start_method="fork") as pool:
        yield pool
        pool.kill_workers()  # one that the test could not end would be waited for


@pytest.mark.parametrize("viewed", [False, True])
def test_the_pipes_of_a_forked_pools_first_call_are_nobody_elses(forked_pool: Pool, viewed: bool) -> None:
    pool = forked_pool.with_options(name="of a view") if viewed else forked_pool
    cat = pool.popen(["cat"], stdin=PIPE, stdout=PIPE)
    assert cat.stdin is not None
    assert cat.stdout is not None
    cat.stdin.write(b"hello")
    cat.stdin.close()
    assert cat.wait(10) == 0
    assert cat.stdout.read() == b"hello"
    cat.close()


def test_a_forked_pools_first_call_is_ended_with_its_handle(forked_pool: Pool) -> None:
    sleeper = forked_pool.popen(["sleep", "1000"], grace=0.1)
    sleeper.close()
    assert sleeper.future.result(10).signal_name == "SIGTERM"


def in_fork(act: Callable[[], object]) -> str:
    """What becomes of a call in a forked child, which ends then."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            os.write(write, repr(act()).encode())
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def leave(program: RunningCommand, error: type[BaseException] | None) -> None:
    program.__exit__(error, None, None)


@pytest.mark.parametrize(
    "act",
    [
        lambda program: leave(program, None),
        lambda program: leave(program, SystemExit),
        RunningCommand.end,
        RunningCommand.close,
    ],
    ids=["leave", "leave by an error", "end", "close"],
)
def test_a_forked_child_leaves_the_parents_program_alone(
    pool: Pool, act: Callable[[RunningCommand], object]
) -> None:
    """P11."""
    with pool.popen(["cat"], stdin=PIPE, stdout=PIPE) as program:
        assert in_fork(lambda: program.pid) == "ForkedPool"  # and has not taken what tells the parent
        assert program.pid == psutil.Process(program.pid).pid
        assert in_fork(lambda: program.pid) == repr(program.pid)
        assert in_fork(lambda: act(program)) == "None"
        assert os.get_blocking(program.stdin.fileno())
        program.stdin.write(b"still here")
        program.stdin.close()
        assert program.stdout.read() == b"still here"
        assert program.wait(20) == 0


def test_a_program_whose_handle_is_dropped_is_ended_whatever_children_there_are(pool: Pool) -> None:
    program = pool.popen(["sleep", "1000"])
    future, process = program.future, psutil.Process(program.pid)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    program.close()
    assert future.result(timeout=20).returncode == -signal.SIGTERM
    assert not process.is_running()
    os.close(write)
    os.waitpid(child, 0)


def test_errors_and_statistics_call_a_program_by_its_arguments() -> None:
    """As they do with `run`."""
    with Pool(1) as pool:
        with pool.popen(["sleep", "1000"]) as sleeper:
            assert sleeper.pid  # it has been started
            assert [worker.running for worker in pool.stats().workers] == ["the program ['sleep', '1000']"]
            sleeper.kill()
        with pool.with_options(timeout=0.5).popen(["sleep", "1000"]) as sleeper:
            with pytest.raises(
                TaskTimeout, match=r"the program \['sleep', '1000'\] had run for 0\.5 seconds"
            ):
                sleeper.wait()
