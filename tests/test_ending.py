"""`_ending`: a worker and what descends from it are given their time, no more, and no less than was promised."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fdpool._ending import Ending
from tests.process_state import seconds_until_gone, wait_until

PROGRAM = """
import os, signal, subprocess, sys, time
def note(*_):
    with open(sys.argv[1], "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGRTMAX - 1, signal.SIG_IGN)  # which asks for stacks
if os.fork() == 0:
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        time.sleep(1000)
    time.sleep(1000)
while True:
    time.sleep(1000)
"""


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    path = tmp_path / "noted"
    path.touch()
    return path


@pytest.fixture
def worker(noted: Path) -> Iterator[subprocess.Popen[str]]:
    """One that notes each SIGTERM, with a child that does so, too, and a grandchild that ignores it."""
    arguments = [sys.executable, "-c", PROGRAM, str(noted)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        try:
            yield process
        finally:
            for each in [*tree.children(recursive=True), tree] if process.poll() is None else []:
                each.kill()


def test_an_end_that_is_hastened_sends_sigterm_once_and_is_never_put_off(
    worker: subprocess.Popen[str], noted: Path
) -> None:
    assert worker.stdout is not None
    grandchild = psutil.Process(int(worker.stdout.readline()))
    child = grandchild.parent()
    assert child is not None
    ending = Ending(worker.pid, None, 600.0, 100.0)
    ending.step(100.0)
    assert ending.due == 700.0
    wait_until(lambda: noted.read_text() == "xx")
    ending.hasten(1000.0, 101.0)
    assert ending.due == 700.0
    child.kill()  # the grandchild loses its parent, and is no descendant any more
    wait_until(lambda: grandchild.ppid() != child.pid)
    ending.hasten(5.0, 200.0)
    assert ending.due == 205.0
    ending.hasten(0.0, 201.0)
    assert ending.due == 201.0
    assert worker.poll() is None
    ending.step(201.0)
    assert ending.due is None
    assert worker.wait(20) == -9
    seconds_until_gone([grandchild], 30.0)
    assert noted.read_text() == "xx"


def test_one_that_is_hastened_before_it_began_has_the_shorter_time(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    worker.stdout.readline()
    with open(os.devnull, "rb") as nothing_written:
        ending = Ending(worker.pid, nothing_written.fileno(), 600.0, 100.0)
        ending.step(100.0)
        assert ending.due is not None
        assert ending.due < 101
        ending.hasten(7.0, 100.1)
        ending.step(101.3)
        assert ending.due == 108.3
        ending.step(108.3)
    assert worker.wait(20) == -9


def test_of_one_that_somebody_else_has_reaped_there_is_nothing_to_end() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    ending = Ending(pid, None, 0.0, time.monotonic())
    ending.step(time.monotonic())
    assert ending.due is None
