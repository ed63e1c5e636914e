"""What an error says of a worker's death: how, where in the program, and what it had to say last. Rows P4 and W3."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fdpool import Pool, WorkerLost
from fdpool._oom import Witness
from tests.contract import count_kills, helpers
from tests.memory_group import memory_group
from tests.process_state import wait_until


def test_a_fault_shows_where_it_happened() -> None:
    with Pool(1) as pool, pytest.raises(WorkerLost, match="killed by SIGSEGV") as caught:
        pool.submit(helpers.read_nowhere).result(timeout=20)
    assert "Fatal Python error: Segmentation fault" in caught.value.stacks
    assert "in read_nowhere" in caught.value.stacks
    assert "in read_nowhere" in str(caught.value)
    assert "<string>" not in caught.value.stacks  # as our own frames are not


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE])
def test_faults_of_all_kinds_are_told_apart(number: signal.Signals) -> None:
    with Pool(1) as pool, pytest.raises(WorkerLost, match=number.name) as caught:
        pool.submit(helpers.die, int(number)).result(timeout=20)
    assert caught.value.signal == number
    assert "in die" in caught.value.stacks


def test_the_end_of_what_a_worker_wrote_to_stderr_is_in_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    def complain() -> None:
        for number in range(1000):
            print(f"complaint {number}", file=sys.stderr)
        os._exit(3)

    with Pool(1) as pool, pytest.raises(WorkerLost, match="exited with code 3") as caught:
        pool.submit(complain).result(timeout=20)
    assert caught.value.stderr.endswith("complaint 998\ncomplaint 999\n")
    assert "complaint 999" in str(caught.value)
    assert "complaint 0\n" not in caught.value.stderr
    assert capfd.readouterr().err == "".join(f"complaint {number}\n" for number in range(1000))


def test_what_an_earlier_worker_wrote_is_not_taken_for_the_next_ones() -> None:
    def complain() -> None:
        print("the first", file=sys.stderr)
        os._exit(1)

    with Pool(1) as pool:
        assert isinstance(pool.submit(complain).exception(timeout=20), WorkerLost)
        second = pool.submit(helpers.die, -2).exception(timeout=20)
    assert isinstance(second, WorkerLost)
    assert second.stderr == ""


@pytest.mark.parametrize(
    "source",
    [
        "import io, sys\nsys.stderr = kept = io.TextIOWrapper(sys.stderr.buffer, line_buffering=True)\n",
        "import sys\nsys.stderr = open(2, 'w', buffering=1)\n",
    ],
    ids=["by the same buffer", "by the same descriptor"],
)
def test_stderr_stays_open_for_all_where_a_preloaded_module_puts_its_own_stream_there(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def complain() -> None:
        print("by the module", file=getattr(sys.modules["puts_its_own"], "kept", sys.stderr))
        print("by the task", file=sys.stderr)
        os._exit(3)

    (tmp_path / "puts_its_own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(1, preload=["puts_its_own"]) as pool, pytest.raises(WorkerLost, match="code 3") as caught:
        pool.submit(complain).result(timeout=20)
    assert caught.value.stderr.endswith("by the task\n")
    assert capfd.readouterr().err == "by the module\nby the task\n"


def test_a_kill_from_outside_is_said_to_be_none_of_the_pools() -> None:
    with Pool(1) as pool, pytest.raises(WorkerLost, match=r"SIGKILL \(not by the pool") as caught:
        pool.submit(helpers.die, int(signal.SIGKILL)).result(timeout=20)
    assert caught.value.stacks == ""


def test_a_fault_in_a_thread_shows_all_threads() -> None:
    def with_a_thread() -> None:
        import threading

        ready = threading.Event()

        def wait_for_ever() -> None:
            ready.set()
            threading.Event().wait()

        threading.Thread(target=wait_for_ever, daemon=True).start()
        ready.wait()
        helpers.read_nowhere()

    with Pool(1) as pool, pytest.raises(WorkerLost) as caught:
        pool.submit(with_a_thread).result(timeout=20)
    assert "in wait_for_ever" in caught.value.stacks
    assert "in read_nowhere" in caught.value.stacks


def test_a_fault_in_a_fork_of_a_program_that_has_faulthandler_on_has_its_stacks() -> None:
    source = """
import ctypes, fdpool
def read_nowhere():
    ctypes.string_at(0)
with fdpool.Pool(1, start_method="fork") as pool:
    print(pool.submit(read_nowhere).exception(20).stacks)
"""
    program = [sys.executable, "-X", "faulthandler", "-c", source]
    done = subprocess.run(program, check=False, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "in read_nowhere" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.timeout(180)
def test_a_pool_works_under_valgrind() -> None:
    """Which keeps the last real-time signal for itself, and says EINVAL to who wants it."""
    source = "import fdpool\nwith fdpool.Pool(1) as pool: print(pool.submit(pow, 2, 10).result())"
    program = ["valgrind", "-q", "--tool=none", "--trace-children=yes", sys.executable, "-c", source]
    done = subprocess.run(program, check=False, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "1024\n", done.stderr


def group(folder: Path, line: str, file: str) -> tuple[str, Path]:
    own = folder / "cgroup"
    own.write_text(line)
    events = folder / file
    events.parent.mkdir(parents=True)
    return str(own), events


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/app\n", "app/memory.events", "low 0\noom 1\noom_kill {}\n"),
        (
            "4:memory:/app\n0::/\n",
            "memory/app/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n",
        ),
    ],
)
def test_the_out_of_memory_killer_is_named_where_the_control_group_counts_it(
    tmp_path: Path, line: str, file: str, text: str
) -> None:
    """W3, in versions 2 and 1 of control groups."""
    own, events = group(tmp_path, line, file)
    events.write_text(text.format(2))
    witness = Witness(str(tmp_path), own)
    assert "nor for want of memory" in witness.explain(signal.SIGKILL)
    events.write_text(text.format(3))
    assert "out-of-memory killer" in witness.explain(signal.SIGKILL)
    assert "nor for want of memory" in witness.explain(signal.SIGKILL)
    assert witness.explain(signal.SIGSEGV) == ""


def test_without_control_groups_it_may_have_been_anybody(tmp_path: Path) -> None:
    witness = Witness(str(tmp_path), str(tmp_path / "none"))
    assert "perhaps by the kernel" in witness.explain(signal.SIGKILL)


class Counted:
    """A witness of a group that counts no kills yet, in a time that passes only as it is told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own, self.events = group(folder, "0::/app\n", "app/memory.events")
        self.count(0)
        self.now = 100.0
        monkeypatch.setattr("fdpool._oom.CLOCK", SimpleNamespace(monotonic=lambda: self.now))
        self.witness = Witness(str(folder), own)

    def count(self, kills: int) -> None:
        self.events.write_text(f"oom_kill {kills}\n")


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(tmp_path, monkeypatch)


def test_several_that_are_killed_together_are_all_named_and_nobody_much_later(counted: Counted) -> None:
    """W3: the count has risen for all of them before the first is looked at."""
    witness = counted.witness
    counted.count(4)
    assert "out-of-memory killer" in witness.explain(signal.SIGKILL)
    assert "out-of-memory killer" in witness.explain(signal.SIGKILL)
    counted.now += 60.0
    assert "nor for want of memory" in witness.explain(signal.SIGKILL)


def test_what_is_said_of_a_kill_for_want_of_memory_is_how_many_there_were_and_since_when(
    counted: Counted,
) -> None:
    """W3: of a program of a task, or of anything else in the group, nobody else tells."""
    witness = counted.witness
    counted.count(1)
    counted.now += 0.25
    hint = witness.explain(signal.SIGKILL)
    assert hint.startswith("perhaps by the kernel's out-of-memory killer")
    assert hint.endswith("its control group counted a kill for want of memory in the last 0.2 seconds")
    counted.count(3)
    counted.now += 4 * 3600
    assert witness.explain(signal.SIGKILL).endswith("counted 2 kills for want of memory in the last 4 hours")


def test_a_kill_for_want_of_memory_is_not_put_down_to_a_worker_that_dies_later(counted: Counted) -> None:
    """W3: it was counted, and somebody has looked since."""
    witness = counted.witness
    counted.count(1)
    counted.now += 2.0
    witness.look_at_times()
    counted.now += 60.0
    assert "nor for want of memory" in witness.explain(signal.SIGKILL)
    counted.events.unlink()  # or nobody can look now
    assert not witness.look()
    assert "perhaps by the kernel for want" in witness.explain(signal.SIGKILL)
    counted.count(2)
    assert "counted a kill" in witness.explain(signal.SIGKILL)


def test_a_supervisor_counts_kills_for_want_of_memory_as_workers_start_and_children_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W3: so an operator's kill is not laid to what has come before."""
    _, events = group(tmp_path, "0::/app\n", "app/memory.events")
    events.write_text("oom_kill 0\n")
    monkeypatch.setenv(count_kills.VARIABLE, str(events))
    with Pool(2, preload=["tests.contract.count_kills"]) as pool:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        events.write_text("oom_kill 1\n")
        # A worker starts, and dies of something else.
        assert isinstance(pool.submit(os._exit, 3).exception(timeout=20), WorkerLost)
        [pid] = {worker.pid for worker in pool.stats().workers if worker.running}
        os.kill(pid, signal.SIGKILL)
        assert "nor for want of memory" in str(running.exception(timeout=20))


def test_a_real_kill_for_want_of_memory_is_recognised() -> None:
    """W3: a task that does not fit into the control group; the other worker, and the pool, go on."""

    def grow() -> None:
        kept = []
        while True:
            kept.append(bytearray(10 << 20))

    with memory_group(150 << 20) as members:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                members.write_text(str(os.getpid()))
                with Pool(2, start_method="fork") as pool:
                    other = pool.submit(os.getpid).result(timeout=60)
                    error = pool.submit(grow).exception(timeout=60)
                    assert pool.submit(os.getpid).result(timeout=60) != os.getpid() != other
                status = 0 if "out-of-memory killer: its control group counted a kill" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
