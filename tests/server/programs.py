"""Servers as programs of their own: started, signalled and read by tests."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import fdpool
from tests.process_state import wait_until
from tests.server.helpers import read_all

ROOT = Path(fdpool.__file__).parent.parent

# What each program begins with: events go to stdout as JSON, one a line, at the moment they happen.
_HEAD = """
import json, logging, os, socket, sys, time
import fdpool

class Tell(logging.Handler):
    def emit(self, record):
        said = {k: v for k, v in vars(record).items() if k not in vars(logging.makeLogRecord({}))}
        said.update(at=os.getpid(), text=record.getMessage())
        os.write(1, json.dumps(said, default=str).encode() + b"\\n")

log = logging.getLogger("fdpool.server")
log.addHandler(Tell())
log.setLevel("DEBUG")

def pid(connection, address):
    data = connection.recv(100)
    if data.startswith(b"sleep"):
        connection.sendall(b"z")
        time.sleep(float(data[5:]))
    connection.sendall(b"%d" % os.getpid())
"""


class Program:
    """A running server program, and what it and its successors have said.

    Attributes:
        pid: of the one that serves now.
        status: exit status of the first one, once it has ended.
    """

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=path.parent,
        )
        self.pid = self._process.pid
        self.heard: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def expect(self, event: str, limit_s: float = 30.0) -> dict[str, Any]:
        """The next record of this event, which may be still to come."""
        while True:
            try:
                record = self._lines.get(timeout=limit_s)
            except queue.Empty:
                raise AssertionError(f"{event!r} did not come, but {self.events()}") from None
            assert record is not None, f"the program has ended without {event!r}, after {self.events()}"
            self.heard.append(record)
            if record.get("event") == event:
                return record

    def events(self) -> list[str]:
        """What was heard so far."""
        return [record.get("event", "?") for record in self.heard]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, limit_s: float = 30.0) -> int:
        """The first process's exit status."""
        return self._process.wait(limit_s)

    def tree(self) -> list[psutil.Process]:
        """The serving process and all that descends from it."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def close(self) -> None:
        for pid in {self.pid, self._process.pid}:
            with contextlib.suppress(ProcessLookupError):
                if pid != self._process.pid or self._process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        wait_until(lambda: not psutil.pid_exists(self.pid) or _is_dead(self.pid))


def _is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def program(folder: Path, body: str, name: str = "program.py", **environment: str) -> Iterator[Program]:
    """Run a program; `body` makes and runs a Server. Waits for nothing."""
    path = folder / name
    path.write_text(_HEAD + textwrap.dedent(body))
    running = Program(path, environment)
    try:
        yield running
    finally:
        running.close()


def port_in(started: dict[str, Any]) -> int:
    """The port of the first address that a program said it serves at."""
    return int(started["addresses"][0].rpartition(":")[2])


def ask_port(port: int, line: bytes = b"x", timeout: float = 20.0) -> int:
    """The pid of the worker that answers one connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as client:
        client.sendall(line)
        return int(read_all(client))
