"""`Pool.run`: programs on handed descriptors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Pool
from tests.conftest import wait_until


@pytest.fixture
def pool() -> Any:
    with Pool(2) as pool:
        yield pool


def test_a_program_reads_and_writes_the_callers_files(pool: Pool, text_file: Path, tmp_path: Path) -> None:
    with open(text_file) as source, open(tmp_path / "out", "wb") as target:
        done = pool.run(["tr", "a-z", "A-Z"], stdin=source, stdout=target).result()
    assert done.returncode == 0
    assert done.args == ["tr", "a-z", "A-Z"]
    assert (tmp_path / "out").read_text() == text_file.read_text().upper()


def test_a_program_speaks_on_a_socket(pool: Pool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            future = pool.run(["cat"], stdin=theirs, stdout=theirs)
        ours.sendall(b"over a socket")
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b"over a socket"
        assert future.result().returncode == 0


def test_output_is_captured_and_input_given(pool: Pool) -> None:
    done = pool.run(["sh", "-c", "cat; echo err >&2"], input=b"in", capture_output=True).result()
    assert (done.stdout, done.stderr) == (b"in", b"err\n")
    done = pool.run(["cat"], input="ä", stdout=subprocess.PIPE, text=True, encoding="utf-8").result()
    assert done.stdout == "ä"
    done = pool.run("echo $0; echo two >&2", stdout=subprocess.PIPE, stderr=subprocess.STDOUT).result()
    assert done.stdout.endswith(b"two\n")


def test_without_stdin_a_program_reads_nothing(pool: Pool) -> None:
    assert pool.run(["cat"], capture_output=True).result().stdout == b""


def test_megabytes_on_both_streams_at_once_do_not_block(pool: Pool) -> None:
    code = "import os\nfor _ in range(64): os.write(1, b'o' * 65536); os.write(2, b'e' * 65536)"
    done = pool.run([sys.executable, "-c", code], capture_output=True).result()
    assert (len(done.stdout), len(done.stderr)) == (64 * 65536, 64 * 65536)


def test_cwd_and_env_are_the_programs_alone(pool: Pool, tmp_path: Path) -> None:
    done = pool.run(
        "pwd; echo $FDPOOL_TEST", cwd=tmp_path, env={"FDPOOL_TEST": "set"}, capture_output=True
    ).result()
    assert done.stdout.decode().split() == [str(tmp_path), "set"]
    assert pool.submit(os.getcwd).result() == os.getcwd()


def test_a_failing_program_is_an_error_only_with_check(pool: Pool) -> None:
    assert pool.run(["false"]).result().returncode == 1
    with pytest.raises(subprocess.CalledProcessError) as caught:
        pool.run("echo why >&2; exit 3", check=True, capture_output=True).result()
    assert (caught.value.returncode, caught.value.stderr) == (3, b"why\n")
    assert pool.run("kill -9 $$").result().returncode == -9


def test_a_program_that_cannot_be_started_is_an_error_of_its_own(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pool.run(["no-such-program-here"]).result()
    with pytest.raises(FileNotFoundError):
        pool.run(["true"], cwd=tmp_path / "missing").result()
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    with pytest.raises(PermissionError):
        pool.run([str(plain)]).result()


def test_a_program_that_overruns_is_killed_with_its_descendants(pool: Pool, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 1000 & echo $! >> {pids}; setsid sleep 1000 & echo $! >> {pids}; echo begun; wait"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        pool.run(script, timeout=0.7, capture_output=True).result()
    assert caught.value.output == b"begun\n"
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started))


def test_a_program_has_its_three_descriptors_and_no_other(pool: Pool) -> None:
    done = pool.run(["ls", "-l", "/proc/self/fd"], capture_output=True).result()
    numbers = sorted(
        int(line.split(b" -> ")[0].split()[-1]) for line in done.stdout.splitlines() if b"->" in line
    )
    assert numbers == [0, 1, 2, 3]  # 3 is the folder that ls reads


def test_a_program_starts_with_default_signals(pool: Pool) -> None:
    done = pool.run(["cat", "/proc/self/status"], capture_output=True).result()
    masks = dict(line.split(b":\t") for line in done.stdout.splitlines() if line.startswith(b"Sig"))
    assert int(masks[b"SigBlk"], 16) == 0
    # The C library's own two, 32 and 33, are whatever this process was started with.
    assert int(masks[b"SigIgn"], 16) & ~(0b11 << 31) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stdin": subprocess.PIPE}, ValueError),
        ({"stdin": 0, "input": b""}, ValueError),
        ({"capture_output": True, "stdout": 1}, ValueError),
        ({"stdout": subprocess.STDOUT}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"stdin": "a name"}, TypeError),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_at_once(
    pool: Pool, options: Any, error: Any
) -> None:
    with pytest.raises(error):
        pool.run(["cat"], **options)
    with pytest.raises(ValueError):
        pool.run([])


def test_a_file_to_file_loop_equals_the_shells(pool: Pool, tmp_path: Path) -> None:
    futures = []
    for n in range(20):
        (tmp_path / f"{n}").write_bytes(os.urandom(1000 * n))
        with open(tmp_path / f"{n}", "rb") as source, open(tmp_path / f"{n}.gz", "wb") as target:
            futures.append(pool.run(["gzip", "-nc"], stdin=source, stdout=target, check=True))
    for future in futures:
        future.result()
    for n in range(20):
        with open(tmp_path / f"{n}", "rb") as source:
            expected = subprocess.run(["gzip", "-nc"], stdin=source, capture_output=True, check=True).stdout
        assert (tmp_path / f"{n}.gz").read_bytes() == expected
