"""Runs the contestants of a measure in turn, so that each round finds the machine in the same mood for all.

What a virtual machine can do changes by a factor within minutes, and between one second and the next: figures of two
runs say nothing about each other. The ratio of two sides within one round does, and its median over many rounds says
it well. All sides are set up first; then in each round each has its turn, in an order that is shuffled anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from . import measures, peers, work
from ._measure import Measure, Settings
from ._results import MeasureResult, SideResult

ROOT = Path(__file__).parents[2]
SET_UP_S = 120.0
ROUND_S = 180.0


class ContestantFailed(Exception):
    """It said why, or did not answer in time, or died."""


class Contestant:
    """The driver's end of one contestant process."""

    def __init__(self, measure: Measure, side: str, settings: Settings, folder: str) -> None:
        environment = {**os.environ, "TMPDIR": folder}
        # Or each interpreter that it starts would compile the package.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command_read, self.commands = os.pipe()
        self.answers, answer_write = os.pipe()
        self.unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}._contestant", str(command_read), str(answer_write)],
            cwd=ROOT,
            env=environment,
            pass_fds=(command_read, answer_write),
            stdin=subprocess.DEVNULL,
            stderr=None if "FDPOOL_BENCH_DEBUG" in os.environ else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command_read)
        os.close(answer_write)
        family = measures.every()[measure]
        order = {"family": family, "measure": measure.name, "side": side}
        self._say({**order, "settings": dataclasses.asdict(settings)})

    def ready(self) -> None:
        self._answer(SET_UP_S)

    def round(self) -> dict[str, Any]:
        self._say("round")
        return self._answer(ROUND_S)

    def end(self) -> str:
        """Stop it; whatever it does not take with it is killed. Returns what is to be said of that, or ""."""
        trouble = ""
        descendants = _descendants(self.process)
        if self.process.poll() is None:
            try:
                self._say("stop")
                self._answer(30)
                self.process.wait(10)
            except (ContestantFailed, subprocess.TimeoutExpired):
                trouble = "it did not stop when told"
                self.process.kill()
                self.process.wait()
        # A pool's helpers may take a moment to see that their client has gone.
        left = _left(descendants, 2)
        for process in left:
            process.kill()
        os.close(self.commands)
        os.close(self.answers)
        return trouble or (f"it left {len(left)} processes" if left else "")

    def _say(self, command: object) -> None:
        try:
            os.write(self.commands, json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            raise ContestantFailed("it died") from None

    def _answer(self, limit_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while b"\n" not in self.unread:
            # Its children may hold the pipe open when it has died, so that there is no end of file.
            if not select.select([self.answers], [], [], 0.2)[0]:
                if self.process.poll() is not None:
                    raise ContestantFailed("it died")
                if time.monotonic() > deadline:
                    raise ContestantFailed(f"no answer within {limit_s:.0f} s")
                continue
            data = os.read(self.answers, 1 << 20)
            if not data:
                raise ContestantFailed("it died")
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantFailed(answer["error"].strip().splitlines()[-1])
        return answer


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _left(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Which of them still run after so long; a zombie, whoever is slow to reap it, does not."""
    deadline = time.monotonic() + limit_s
    left = []
    for process in processes:
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        # Kernel: a pidfd is readable once its process has ended (pidfd_open(2)).
        if (
            not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]
            and process.is_running()
        ):
            left.append(process)
        os.close(pidfd)
    return left


def run(
    measure: Measure, wanted: Iterable[str], rounds: int | None, quick: bool, say: Callable[[str], None]
) -> MeasureResult:
    """All sides of `measure` that are wanted, in turn; `say` is told what is skipped and why."""
    with tempfile.TemporaryDirectory(prefix="fdpool-bench-") as folder:
        return _run(measure, wanted, rounds, quick, say, folder)


def _run(
    measure: Measure,
    wanted: Iterable[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
    folder: str,
) -> MeasureResult:
    settings = Settings(measure.quick_size if quick else measure.size, step=spin_steps())
    result = MeasureResult.of(measure, settings.size)
    contestants: dict[str, Contestant] = {}

    def drop(side: str, why: object) -> None:
        say(f"{measure.name}: {side} is skipped: {why}")
        result.skipped[side] = str(why)
        result.sides.pop(side, None)
        if side in contestants:
            contestants.pop(side).end()

    try:
        for side in [side for side in measure.sides if side in wanted or side not in peers.PEERS]:
            module = peers.missing(side.partition(":")[0])
            if module is not None:
                drop(side, f"{module} is not installed")
                continue
            contestants[side] = Contestant(measure, side, settings, folder)
        for side in list(contestants):
            try:
                contestants[side].ready()
                if measure.warm_up:
                    contestants[side].round()
                result.sides[side] = SideResult()
            except ContestantFailed as error:
                drop(side, error)
        for _ in range(rounds or (measure.quick_rounds if quick else measure.rounds)):
            for side in random.sample(list(contestants), len(contestants)):
                try:
                    result.sides[side].add(contestants[side].round())
                except ContestantFailed as error:
                    drop(side, error)
    finally:
        for side in list(contestants):
            trouble = contestants.pop(side).end()
            if trouble:
                say(f"{measure.name}: {side}: {trouble}")
                result.notes[side] = trouble
    return result


_steps = 0


def spin_steps() -> int:
    """The loop count of `work.spin` that takes 20 µs here, at its best."""
    global _steps
    if not _steps:
        best_s = min(_seconds(100_000) for _ in range(20))
        _steps = max(1, round(20e-6 / best_s * 100_000))
    return _steps


def _seconds(steps: int) -> float:
    begun = time.perf_counter()
    work.spin(steps)
    return time.perf_counter() - begun
