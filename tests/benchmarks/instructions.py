"""What a task takes its client in instructions, as valgrind counts them: for who works on the way of a task.

    python -m tests.benchmarks.instructions [round-trip | flood] [--pools fdpool,ppe] [--functions]

Times of the same code differ by a tenth and more from run to run; instructions by a few hundredths, however busy the
machine is. But a program runs some fifty times as long under valgrind: what goes by the clock (messages of several
tasks, looks at who stands still) happens more often than it does elsewhere. `--functions` needs no valgrind: it says
which functions of fdpool's the client is in, and how much of their bytecode it runs for a task.
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


def by_function(what: str, tasks: int) -> tuple[collections.Counter[CodeType], collections.Counter[CodeType]]:
    """How many bytecodes each function of the client runs, in all its threads, and how often it is called."""
    codes: collections.Counter[CodeType] = collections.Counter()
    calls: collections.Counter[CodeType] = collections.Counter()

    def inside(frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        if event == "opcode":
            codes[frame.f_code] += 1
        return inside

    def called(frame: FrameType, _event: str, _argument: object) -> Callable[..., Any]:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        calls[frame.f_code] += 1
        return inside

    threading.settrace(called)  # for the pump, which is yet to start
    with peers.opened("fdpool") as pool:
        run(pool, what, _WARM)
        codes.clear()
        calls.clear()
        sys.settrace(called)
        run(pool, what, tasks)
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        return codes.copy(), calls.copy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.instructions", description=__doc__)
    parser.add_argument("what", choices=sorted(_TASKS), nargs="?", default="flood")
    parser.add_argument("--pools", default="fdpool,ppe,mp")
    parser.add_argument("--functions", action="store_true")
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    few, many = _TASKS[asked.what]
    if asked.tasks is not None:
        with peers.opened(asked.pools) as pool:
            run(pool, asked.what, _WARM + asked.tasks)
    elif asked.functions:
        codes, calls = by_function(asked.what, many)
        print(f"{codes.total() / many:9,.0f} bytecodes a task, in {calls.total() / many:.0f} calls")
        for code, count in codes.most_common(40):
            where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
            print(f"{count / many:9,.0f} {calls[code] / many:7.2f}  {code.co_name:24} {where}")
    elif shutil.which("valgrind") is None:
        parser.error("valgrind is not installed; --functions does without")
    else:
        for name in asked.pools.split(","):
            each = (counted(name, asked.what, many) - counted(name, asked.what, few)) / (many - few)
            print(f"{each:9,.0f} instructions a task: {name}", flush=True)


if __name__ == "__main__":
    main()
