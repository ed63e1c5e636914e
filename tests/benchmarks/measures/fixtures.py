"""Tests with a server each: the plugin's fixture, and the usual ones with a free port and a polling loop."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .._measure import Measure, Outcome, Round, Settings, ahead_of

ROOT = Path(__file__).parents[3]

SERVER = """
import socket, sys

def answer(listening):
    while True:
        with listening.accept()[0] as connection:
            connection.sendall(connection.recv(100).upper())

def main(port):
    answer(socket.create_server(("127.0.0.1", port)))

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""

#: As they are found in many projects, but with a pause of 10 ms where 100 or more are usual, and none of them too long.
POLLING = """
import multiprocessing, socket, subprocess, sys, time
import pytest
import server

def free_port():
    with socket.socket() as finding:
        finding.bind(("127.0.0.1", 0))
        return finding.getsockname()[1]

def wait(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)

@pytest.fixture
def address():
    port = free_port()
    process = START
    wait(port)
    yield "127.0.0.1", port
    process.terminate()
    STOP
"""

FIXTURES = {
    "fdpool": """
import pytest
import server

pytest_plugins = ["fdpool.pytest_plugin"]

@pytest.fixture
def address(serve):
    return serve(server.answer).address
""",
    "forked": POLLING.replace(
        "START",
        'multiprocessing.get_context("fork").Process(target=server.main, args=(port,), daemon=True); process.start()',
    ).replace("STOP", "process.join()"),
    "program": POLLING.replace("START", 'subprocess.Popen([sys.executable, "server.py", str(port)])').replace(
        "STOP", "process.wait()"
    ),
}

TESTS = """
import socket, pytest

@pytest.mark.parametrize("number", range({size}))
def test_it(address, number):
    with socket.create_connection(address) as client:
        client.sendall(b"x")
        assert client.recv(10) == b"X"
"""


@contextmanager
def project(side: str, settings: Settings) -> Iterator[Round]:
    """A folder with so many tests; a round runs pytest there, the start of the interpreter included."""
    with tempfile.TemporaryDirectory(prefix="fdpool-bench-") as name:
        folder = Path(name)
        (folder / "server.py").write_text(SERVER)
        (folder / "conftest.py").write_text(FIXTURES[side])
        (folder / "test_it.py").write_text(TESTS.replace("{size}", str(settings.size)))
        (folder / "pytest.ini").write_text(
            "[pytest]\naddopts = -p no:cacheprovider -p no:randomly -p no:asyncio\n"
        )

        def one_round() -> Outcome:
            subprocess.run(
                [sys.executable, "-m", "pytest", "-q"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return Outcome(settings.size)

        yield one_round


MEASURES = (
    Measure(
        "fixtures",
        "Tests",
        "200 tests with a server each, for each test",
        {side: partial(project, side) for side in FIXTURES},
        size=200,
        quick_size=5,
        unit="ms",
        scale=1e3,
        goals=(ahead_of("forked", 1), ahead_of("program", 3)),
        rounds=5,
        labels={
            "forked": "a forked process, a free port, polled every 10 ms",
            "program": "a program, a free port, polled every 10 ms",
        },
    ),
)
