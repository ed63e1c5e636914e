"""Mixed tasks in great number while workers are killed: `python -m tests.chaos [--tasks N] [--seed S]`.

Everything that a task may be: tiny, large, with descriptors in and out, failing, running a program; submitted
from several threads while workers are killed at random moments. At the end each future must be settled and each
result right, no more tasks may be lost than workers were killed, no task may have run twice (each leaves a
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import Any

import fdpool
from tests.process_state import children, open_descriptors


def mark(ledger: int, number: int) -> None:
    """Say in the ledger that task `number` runs: one atomic append of eight bytes."""
    os.write(ledger, number.to_bytes(8, "little"))


def tiny(ledger: Any, number: int) -> int:
    mark(ledger.fileno(), number)
    return number * 3


def large(ledger: Any, number: int, data: bytes) -> tuple[int, bytes]:
    mark(ledger.fileno(), number)
    return number, data[::-1]


def through_pipe(ledger: Any, number: int, end: Any) -> int:
    mark(ledger.fileno(), number)
    with end:
        end.write(number.to_bytes(8, "little"))
    return number


def opens(ledger: Any, number: int) -> Any:
    mark(ledger.fileno(), number)
    file = tempfile.TemporaryFile()
    file.write(number.to_bytes(8, "little"))
    file.seek(0)
    return file


def fails(ledger: Any, number: int) -> None:
    mark(ledger.fileno(), number)
    raise KeyError(number)


class Chaos:
    """One run: submits, kills, checks."""

    def __init__(self, tasks: int, seed: int, workers: int, threads: int) -> None:
        self.tasks, self.workers, self.threads = tasks, workers, threads
        self.random = random.Random(seed)
        self.ledger = tempfile.TemporaryFile(buffering=0)
        os.set_inheritable(self.ledger.fileno(), False)
        self.append = open(f"/proc/self/fd/{self.ledger.fileno()}", "ab", buffering=0)
        self.kills = 0
        self.lost = 0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def submit(self, pool: fdpool.Pool, number: int, dice: random.Random) -> None:
        """Submit one task of a random kind, wait for it now and then, and check what it gives."""
        kind = dice.choices(["tiny", "large", "pipe", "opens", "fails", "program"], [60, 8, 14, 10, 7, 1])[0]
        result: Any = None
        read = -1
        try:
            if kind == "tiny":
                result = pool.submit(tiny, self.append, number).result() == number * 3
            elif kind == "large":
                data = dice.randbytes(dice.choice([100, 70_000, 300_000]))
                result = pool.submit(large, self.append, number, data).result() == (number, data[::-1])
            elif kind == "pipe":
                read, write = os.pipe()
                with open(write, "wb") as end:
                    future = pool.submit(through_pipe, self.append, number, end)
                expected = number.to_bytes(8, "little")
                result = (
                    future.result() == number and os.read(read, 9) == expected and os.read(read, 1) == b""
                )
            elif kind == "opens":
                with pool.submit(opens, self.append, number).result() as file:
                    result = file.read() == number.to_bytes(8, "little")
            elif kind == "fails":
                try:
                    pool.submit(fails, self.append, number).result()
                except KeyError as error:
                    result = error.args == (number,)
            else:
                done = pool.run(["echo", str(number)], capture_output=True).result()
                result = done.stdout == f"{number}\n".encode() or done.returncode < 0
        except fdpool.WorkerLost:
            with self.lock:
                self.lost += 1
            result = True
        finally:
            if read >= 0:
                os.close(read)
        with self.lock:
            self.done[kind] += 1
            if result is not True:
                self.wrong.append(f"task {number} ({kind}) gave {result!r}")

    def client_thread(self, pool: fdpool.Pool, numbers: range, seed: int) -> None:
        dice = random.Random(seed)
        try:
            for number in numbers:
                self.submit(pool, number, dice)
        except BaseException as error:
            with self.lock:
                self.wrong.append(f"a client thread ended with {type(error).__name__}: {error}")

    def assassin(self, pool: fdpool.Pool) -> None:
        while not self.stop.wait(self.random.uniform(0.005, 0.08)):
            pids = pool.worker_pids()
            if not pids:
                continue
            try:
                os.kill(
                    self.random.choice(pids),
                    self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV]),
                )
                self.kills += 1
            except ProcessLookupError:
                continue

    def run(self) -> list[str]:
        """The whole run; returns what was wrong."""
        fds_before, children_before = set(open_descriptors()), set(children())
        with fdpool.Pool(self.workers) as pool:
            killer = threading.Thread(target=self.assassin, args=(pool,))
            share = self.tasks // self.threads
            threads = [
                threading.Thread(
                    target=self.client_thread,
                    args=(pool, range(n * share + 1, (n + 1) * share + 1), self.random.getrandbits(32)),
                )
                for n in range(self.threads)
            ]
            for thread in (killer, *threads):
                thread.start()
            for thread in threads:
                thread.join()
            self.stop.set()
            killer.join()
        if set(open_descriptors()) - fds_before:
            self.wrong.append(f"descriptors left: {set(open_descriptors()) - fds_before}")
        if set(children()) - children_before:
            self.wrong.append(f"processes left: {set(children()) - children_before}")
        self.ledger.seek(0)
        entries = self.ledger.read()
        ran = Counter(entries[n : n + 8] for n in range(0, len(entries), 8))
        twice = [int.from_bytes(number, "little") for number, count in ran.items() if count > 1]
        if twice:
            self.wrong.append(f"tasks that ran twice: {twice[:10]}")
        if self.lost > self.kills:
            self.wrong.append(f"{self.lost} tasks lost by {self.kills} kills")
        self.append.close()
        self.ledger.close()
        return self.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    begun = time.monotonic()
    chaos = Chaos(options.tasks, options.seed, options.workers, options.threads)
    wrong = chaos.run()
    print(
        f"seed {options.seed}: {sum(chaos.done.values())} tasks in {time.monotonic() - begun:.1f} s, "
        f"{chaos.kills} workers killed, {chaos.lost} tasks lost, {len(wrong)} wrong; {dict(chaos.done)}"
    )
    for line in wrong[:20]:
        print("  " + line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
