"""A server in a process of its own, started as users start it, `fdpool serve`, and watched by its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.process_state import wait_until

ROOT = Path(__file__).parents[2]
Event = dict[str, Any]


class ServerGone(Exception):
    """The process ended while something was expected of it; the message has the end of its log."""


class Served:
    """`fdpool serve` and what it logs.

    Attributes:
        events: the log so far, a dictionary for each line; `text` holds what is no JSON.
        address: of its first listener, once `started`.
        pid: of the process that serves now; another one after an upgrade.

    Args:
        under: a command that runs the server's, which comes after it.
    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, under: Sequence[str] = ()) -> None:
        self.events: list[Event] = []
        self.text: list[str] = []
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "fdpool", "serve", "--log-json", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.address = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    self.text.append(line)

    def wait_for(self, name: str, since: int = 0, limit_s: float = 30.0, **fields: object) -> Event:
        """The first event of that name and with those fields, from number `since` on.

        Raises:
            ServerGone: the server has ended, or it takes too long.
        """
        deadline = time.monotonic() + limit_s
        while True:
            for event in self.events[since:]:
                if event.get("event") == name and all(
                    event.get(key) == value for key, value in fields.items()
                ):
                    return event
            if not self._reader.is_alive() or time.monotonic() > deadline:
                raise ServerGone(f"no {name!r} came; its log ends with\n{self.tail()}")
            time.sleep(0.002)

    def started(self) -> Served:
        """Wait until it serves."""
        self.address = self.wait_for("started")["addresses"][0]
        return self

    def tell(self, number: int) -> int:
        """Send a signal to the server; returns how many events there were before."""
        seen = len(self.events)
        os.kill(self.pid, number)
        return seen

    def workers(self) -> list[int]:
        """Pids of the workers that have said that they are ready, and live."""
        found = [event["worker_pid"] for event in self.events if event.get("event") == "worker_ready"]
        return [pid for pid in found if is_alive(pid)]

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join([*map(str, self.events[-15:]), *self.text[-30:]])

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        """End it, and wait for that; returns the exit status, None if that was a successor's, which is not ours."""
        tree = _tree(self.pid)
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass
        try:
            wait_until(lambda: not is_alive(self.pid), 30.0)
        finally:
            for each in psutil.wait_procs(tree, timeout=2)[1]:
                each.kill()
            status = self.process.wait(10)
            self._reader.join(10)
        return status if self.pid == self.process.pid else None


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_alive(pid: int) -> bool:
    """False for a zombie, too."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def served(*arguments: str, env: dict[str, str] | None = None, under: Sequence[str] = ()) -> Iterator[Served]:
    """A server for a `with` block, which begins when it serves."""
    server = Served(*arguments, env=env, under=under)
    try:
        yield server.started()
    finally:
        server.stop()
