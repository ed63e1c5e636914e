"""What the tests of workers run in them; without pytest, which each worker would import."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from . import helpers


def fail_at(gate: str) -> None:
    helpers.wait_at(gate)
    raise LookupError("no configuration")


def log_and_look() -> tuple[int, list[str]]:
    import psutil

    logging.getLogger("fdpool.test").warning("a record")
    supervisor = psutil.Process(os.getppid())
    return supervisor.num_threads(), [thread.name for thread in threading.enumerate()]


def start_two() -> tuple[int, int]:
    here = subprocess.Popen(["sleep", "1000"])
    elsewhere = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return here.pid, elsewhere.pid


def start_orphan() -> int:
    """A process that has left worker, group and session behind, and runs no program that would carry the mark."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    os.wait()
    pid = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    return pid


def start_orphan_and_die(path: str) -> None:
    Path(path).write_text(str(start_orphan()))
    os.kill(os.getpid(), signal.SIGKILL)


def start_orphan_and_hang(path: str) -> None:
    orphan = start_orphan()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
    Path(path).write_text(str(orphan))
    time.sleep(1000)


def begin_and_wait(folder: str) -> None:
    atexit.register(Path(folder, "left").touch)
    Path(folder, "begun").touch()
    helpers.wait_at(f"{folder}/gate")
