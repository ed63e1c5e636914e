"""What a task takes its client in instructions, as valgrind counts them: for who works on the way of a task.

    python -m tests.benchmarks.instructions [round-trip | flood] [--pools fdpool,ppe] [--functions | --worker]

Times of the same code differ by a tenth and more from run to run; instructions by a few hundredths, however busy the
machine is. But a program runs some fifty times as long under valgrind: what goes by the clock (messages of several
tasks, looks at who stands still) happens more often than it does elsewhere. `--functions` needs no valgrind: it says
which functions of fdpool's the client is in, and how much of their bytecode it runs for a task; `--worker` says so of
the worker. Counting takes fifty times as long, too: the pump wakes for nearly every task.
"""

from __future__ import annotations

import argparse
import collections
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import fdpool

from . import peers
from .work import noop

_TASKS = {"round-trip": (200, 800), "flood": (1000, 4000)}  # what differs between two runs is not the start
_WARM = 50


def run(pool: peers.Peer, what: str, tasks: int) -> None:
    """So many tasks that do nothing, one by one or all at once."""
    if what == "flood":
        pool.many(noop, [()] * tasks)
    else:
        for _ in range(tasks):
            pool.call(noop)


def counted(name: str, what: str, tasks: int) -> int:
    """Instructions of a client that has a pool do so many tasks, its start included."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/%p", sys.executable]
        command += ["-m", __spec__.name, what, "--pools", name, "--tasks", str(tasks)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        totals = []
        for path in glob.glob(f"{folder}/*"):  # of forked children, too: they do little
            with open(path) as file:
                totals += [
                    int(found[1]) for found in re.finditer(r"^totals: (\d+)", file.read(), re.MULTILINE)
                ]
        return max(totals)


class Counts:
    """How many bytecodes each function runs, and how often it is called.

    Functions are told by code, file and first line, as what is counted in a worker has to come here.
    """

    def __init__(self) -> None:
        self.codes: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self.calls: collections.Counter[tuple[str, str, int]] = collections.Counter()

    def inside(self, frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        if event == "opcode":
            self.codes[_told(frame.f_code)] += 1
        return self.inside

    def called(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., Any]:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.calls[_told(frame.f_code)] += 1
        return self.inside


def _told(code: CodeType) -> tuple[str, str, int]:
    return code.co_name, os.path.basename(code.co_filename), code.co_firstlineno


def of_client(what: str, tasks: int) -> Counts:
    """Counts of the client, in all its threads."""
    counts = Counts()
    threading.settrace(counts.called)  # for the pump, which is yet to start
    with peers.opened("fdpool") as pool:
        run(pool, what, _WARM)
        counts.codes.clear()
        counts.calls.clear()
        sys.settrace(counts.called)
        run(pool, what, tasks)
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        found = Counts()
        found.codes, found.calls = counts.codes.copy(), counts.calls.copy()
        return found


def of_worker(what: str, tasks: int) -> Counts:
    """Counts of the one worker of a pool."""
    with fdpool.Pool(1) as pool:
        peer = peers.Fdpool.__new__(peers.Fdpool)
        peer._take(pool)
        run(peer, what, _WARM)
        pool.submit(_count).result()
        run(peer, what, tasks)
        codes, calls = pool.submit(_counted).result()
    found = Counts()
    found.codes, found.calls = codes, calls
    return found


def _count() -> None:
    """Runs in: a worker. Count from now on, in the functions too that it is in: its loop is one of them."""
    counts = sys._counts = Counts()  # type: ignore[attr-defined]  # for `_counted`, whatever module that is in
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        frame.f_trace = counts.inside
        frame = frame.f_back
    sys.settrace(counts.called)


def _counted() -> tuple[Any, Any]:
    """Runs in: that worker. Count no more; returns what was counted."""
    sys.settrace(None)
    counts: Counts = sys._counts  # type: ignore[attr-defined]
    return counts.codes, counts.calls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.instructions", description=__doc__)
    parser.add_argument("what", choices=sorted(_TASKS), nargs="?", default="flood")
    parser.add_argument("--pools", default="fdpool,ppe,mp")
    parser.add_argument("--functions", action="store_true")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    few, many = _TASKS[asked.what]
    if asked.tasks is not None:
        with peers.opened(asked.pools) as pool:
            run(pool, asked.what, _WARM + asked.tasks)
    elif asked.functions or asked.worker:
        counts = (of_worker if asked.worker else of_client)(asked.what, many)
        print(
            f"{counts.codes.total() / many:9,.0f} bytecodes a task, in {counts.calls.total() / many:.0f} calls"
        )
        for code, count in counts.codes.most_common(40):
            name, file, line = code
            print(f"{count / many:9,.0f} {counts.calls[code] / many:7.2f}  {name:24} {file}:{line}")
    elif shutil.which("valgrind") is None:
        parser.error("valgrind is not installed; --functions does without")
    else:
        for name in asked.pools.split(","):
            each = (counted(name, asked.what, many) - counted(name, asked.what, few)) / (many - few)
            print(f"{each:9,.0f} instructions a task: {name}", flush=True)


if __name__ == "__main__":
    main()
