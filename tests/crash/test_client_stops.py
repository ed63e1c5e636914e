"""A program that uses a pool is killed, or stopped for a while, at each point of a task's way.

Design section 9: after a SIGKILL everything is gone within a second, what the tasks have started included; a busy
machine is allowed four.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fdpool._trees import WORKER_MARK
from tests.process_state import seconds_until_gone, wait_until

from . import points

ROOT = Path(__file__).parents[2]

#: Two workers: one holds a large argument and a program in a session of its own, the other takes what stops.
SCRIPT = """
import os, signal, subprocess, sys
from pathlib import Path
import fdpool
from tests.contract import helpers
from tests.crash import points

name, folder, ledger = sys.argv[1:]

def hold(data, folder):
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(folder, "held").touch()
    with open(Path(folder, "gate")) as gate:
        return gate.read() or len(data)

if name in points.POINTS:
    points.install(name, folder)
pool = fdpool.Pool(2)
held = pool.submit(hold, bytes(1_000_000), folder)
points.wait_until(Path(folder, "held").exists)
points.arm(Path(folder))
futures = [pool.submit(helpers.note, ledger, n) for n in range(4)]
lost = pool.submit(helpers.die, signal.SIGKILL)
futures += [pool.submit(helpers.note, ledger, n) for n in range(4, 8)]
if name == "while tasks run":
    points.reach(folder)
print([future.result() for future in futures], type(lost.exception()).__name__, flush=True)
os.close(os.open(Path(folder, "gate"), os.O_WRONLY))
print(held.result(), flush=True)
pool.shutdown()
"""

POINTS = ["while tasks run", *points.CLIENT]


@contextmanager
def stopped_at(name: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The program, standing at the point."""
    ledger = folder / "ledger"
    ledger.touch()
    os.mkfifo(folder / "gate")
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, str(folder), str(ledger)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        try:
            wait_until(lambda: points.reached(folder) or program.poll() is not None)
            assert points.stopped(folder) == program.pid
            yield program
        finally:
            program.kill()


def marked_by(supervisor: int) -> list[psutil.Process]:
    """What lives of a supervisor's workers and of all that they have started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(WORKER_MARK, "").startswith(f"{supervisor}."):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("name", POINTS)
def test_nothing_outlives_a_client_that_is_killed_at_any_point(name: str, tmp_path: Path) -> None:
    with stopped_at(name, tmp_path) as program:
        tree = psutil.Process(program.pid).children(recursive=True)
        assert len(tree) >= 3  # supervisor, worker, sleep
        program.kill()
        assert seconds_until_gone(tree) < 4.0
        assert not marked_by(tree[0].pid), "a worker was started after its client's death, and stays"
    ran = (tmp_path / "ledger").read_text().split()
    assert len(ran) == len(set(ran)), "a task ran twice"


@pytest.mark.parametrize("name", POINTS)
def test_a_client_that_stands_still_at_any_point_and_goes_on_loses_nothing(name: str, tmp_path: Path) -> None:
    with stopped_at(name, tmp_path) as program:
        tree = psutil.Process(program.pid).children(recursive=True)
        os.kill(program.pid, signal.SIGCONT)
        output, _ = program.communicate(timeout=30)
        assert output == "[0, 1, 2, 3, 4, 5, 6, 7] WorkerLost\n1000000\n"
        assert program.returncode == 0
        assert seconds_until_gone(tree) < 4.0
    assert sorted((tmp_path / "ledger").read_text().split()) == list("01234567")
