"""What can be measured but once in a process: `python -m tests.benchmarks._fresh_client VERB PEER [ARGUMENT]`.

It prints a line of JSON. It imports what a user of the peer would have imported, and no more.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys

from . import peers, work
from ._cpu import Meter, tree, uss
from ._gate import gate


def start(name: str) -> None:
    """From the pool's making to its first result; what a user would have imported before is imported before."""
    importlib.import_module(peers.PEERS[name].imported or peers.PEERS[name].module)
    with Meter() as meter:
        pool = peers.PEERS[name](2)
        pool.call(work.noop)
    say({"value": meter.wall_s, "cpu": meter.cpu_s})
    pool.close()


def modules(name: str) -> None:
    """What a worker has imported that runs its first task."""
    pool = peers.PEERS[name](2)
    say(pool.call(work.modules))
    pool.close()


def bare(names: str) -> None:
    """From the start of an interpreter to a byte from it, when it has imported these modules."""
    lines = [f"try: import {name}\nexcept ImportError: pass" for name in names.split(",")]
    program = "\n".join([*lines, "import os; os.write(1, b'x')"])
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    read, write = os.pipe()
    with Meter() as meter:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *flags, "-c", program],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
        )
        os.read(read, 1)
    os.waitpid(pid, 0)
    say({"value": meter.wall_s, "cpu": meter.cpu_s})


def queue(name: str, count: str) -> None:
    """Bytes of this process that a task takes while it waits, and the CPU of submitting it."""
    with gate() as shut:
        pool = peers.PEERS[name](2)
        handles = [pool.submit(work.tell_and_wait_at, shut.fifo, shut.path) for _ in range(2)]
        shut.heard(2)
        before = uss(os.getpid())
        submit = pool.submit
        with Meter() as meter:
            handles += [submit(work.noop) for _ in range(int(count))]
        queued = uss(os.getpid()) - before
        # Not waited for: some of the peers would take minutes.
        for pid in list(tree(os.getpid()))[1:]:
            os.kill(pid, signal.SIGKILL)
    say({"value": queued / int(count), "cpu": meter.cpu_s / int(count)})
    os._exit(0)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


VERBS = {"start": start, "modules": modules, "bare": bare, "queue": queue}


if __name__ == "__main__":
    VERBS[sys.argv[1]](*sys.argv[2:])
