"""Servers with two workers and the same application, and one set of verbs for all of them.

Each gets its listening socket open, so that no port is guessed, but for uvicorn, which takes a socket that it is given
for a Unix one, and does not set TCP_NODELAY. Access logs are switched off. Each is told what kind of application it is,
as gunicorn has to be.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from tests.load._client import Client

WORKERS = 2
_READY_S = 30.0
_BACKLOG = 2048

_APP = "tests.load.app"
_UVICORN = ("-m", "uvicorn", "--no-access-log", "--log-level", "error")
_GUNICORN = ("-m", "gunicorn", "--log-level", "error")
_FDPOOL = (
    *("-m", "fdpool", "serve", "{app}", "--interface", "{form}"),
    *("--workers", "{workers}", "--bind", "fd:{fd}"),
)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "fdpool": _FDPOOL,
    "fdpool-handoff": (*_FDPOOL, "--dispatch", "handoff"),
    "fdpool-sync": (*_FDPOOL, "--threads", "1"),
    "fdpool-standby": (*_FDPOOL, "--standby", "1"),
    "fdpool-sync-standby": (*_FDPOOL, "--threads", "1", "--standby", "1"),
    "fdpool-preload": (*_FDPOOL, "--preload", _APP),
    "uvicorn": (*_UVICORN, "--workers", "{workers}", "--port", "{port}", "{app}"),
    "gunicorn": (*_GUNICORN, "-w", "{workers}", "-b", "fd://{fd}", "{app}"),
    "gunicorn-threads": (
        *(*_GUNICORN, "-k", "gthread", "--threads", "4"),
        *("-w", "{workers}", "-b", "fd://{fd}", "{app}"),
    ),
    "gunicorn-preload": (*_GUNICORN, "--preload", "-w", "{workers}", "-b", "fd://{fd}", "{app}"),
    "gunicorn-uvicorn": (
        *(*_GUNICORN, "-k", "uvicorn_worker.UvicornWorker"),
        *("-w", "{workers}", "-b", "fd://{fd}", "{app}"),
    ),
}
LABELS = {
    "fdpool": "`fdpool serve`",
    "fdpool-handoff": "`fdpool serve --dispatch handoff`",
    "fdpool-sync": "`fdpool serve --threads 1`",
    "fdpool-standby": "`fdpool serve --standby 1`",
    "fdpool-sync-standby": "`fdpool serve --threads 1 --standby 1`",
    "fdpool-preload": "`fdpool serve --preload`",
    "uvicorn": "uvicorn --workers",
    "gunicorn": "gunicorn, sync workers",
    "gunicorn-threads": "gunicorn, workers of 4 threads",
    "gunicorn-preload": "gunicorn --preload, sync workers",
    "gunicorn-uvicorn": "gunicorn, uvicorn workers",
}


class Server:
    """A running server, all of whose workers have answered.

    Args:
        name: one of LABELS.
        form: of the application, "asgi", "wsgi" or "handler".
    """

    def __init__(self, name: str, form: str) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
            port = listener.getsockname()[1]
            command = [
                word.format(workers=WORKERS, fd=listener.fileno(), port=port, form=form, app=f"{_APP}:{form}")
                for word in _COMMANDS[name]
            ]
            opens_it_itself = str(port) in command
            if opens_it_itself:
                listener.close()
            self.address = f"tcp://127.0.0.1:{port}"
            self.process = subprocess.Popen(
                [sys.executable, *command],
                pass_fds=[] if opens_it_itself else [listener.fileno()],
                env=os.environ | {"PYTHONPATH": os.getcwd()},
                start_new_session=True,
            )
        try:
            self.wait_for(lambda pids: len(pids) == WORKERS)
        except BaseException:
            self.close()
            raise

    def answering(self) -> set[int]:
        """Pids of the workers that answer a few dozen requests now."""
        tally = Client(self.address, connections=8, keep_alive=0.0, timeout_s=5.0).run(0.05)
        return set(tally.pids)

    def wait_for(self, condition: Callable[[set[int]], bool]) -> set[int]:
        """The pids that answer, once `condition` of them is true."""
        deadline = time.monotonic() + _READY_S
        while not condition(pids := self.answering()):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"it was waited for in vain; {len(pids)} workers answer")
        return pids

    def reload(self) -> None:
        """Have every worker replaced, and wait until none of the old ones lives."""
        old = self.wait_for(lambda pids: len(pids) == WORKERS)
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + _READY_S
        while any(map(_lives, old)):
            if time.monotonic() > deadline:
                raise RuntimeError("it has not replaced its workers")
            time.sleep(0.01)

    def close(self) -> None:
        """End it, with all that it has started."""
        tree = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(tree, timeout=2)[1]:
            process.kill()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serving(name: str, form: str) -> Iterator[Server]:
    """A server for a `with` block."""
    server = Server(name, form)
    try:
        yield server
    finally:
        server.close()
