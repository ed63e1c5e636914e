"""Everything that a task of a chaos may be: how each is submitted, and what is right for it to give.

A kind is a function that submits one task, or some that belong together, waits for them, and asserts that what they
give is right. What a disturbance may do to a task is raised: `WorkerLost`, and, for want of descriptors, `OSError` and
`FdTransferError`.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import fdpool

from . import tasks

#: How long a result may take; a task that takes longer hangs.
LIMIT_S = 60.0
#: What a kind is called with is the first of so many numbers, one for each task that it may submit.
SPAN = 4096


@dataclass
class World:
    """What all kinds have in common, on one of the pools; the worlds of the others have the same records.

    Attributes:
        ledger: open for appending; its path is for tasks that carry no descriptor.
        called_back: how often each future did; by a key, as a future would keep its result.
        never: tasks that must not have run: cancelled, or refused.
        ran: tasks that must have, as they have given a result.
        tries: tasks that may have run more often than once.
        logged: tasks whose record must have come, as their result has.
    """

    pool: fdpool.Pool
    ledger: Any
    path: str
    table: Any
    called_back: dict[int, int] = field(default_factory=dict)
    keys: Iterator[int] = field(default_factory=itertools.count)
    never: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    tries: dict[int, int] = field(default_factory=dict)
    logged: set[int] = field(default_factory=set)

    def watch(self, future: Future[Any]) -> Future[Any]:
        key = next(self.keys)
        self.called_back[key] = 0

        def count(_: Future[Any]) -> None:
            self.called_back[key] += 1

        future.add_done_callback(count)
        return future

    def submit(
        self, number: int, fn: Any, *args: Any, pool: fdpool.Pool | None = None
    ) -> fdpool.TaskFuture[Any]:
        """Submit task `number`, to a view of the pool perhaps; what is refused here must not run."""
        try:
            future = (pool or self.pool).submit(fn, *args)
        except BaseException:
            self.never.add(number)
            raise
        self.watch(future)
        return future

    def result(self, number: int, future: Future[Any]) -> Any:
        """The result; notes what it, or an error, says of whether the task has run."""
        try:
            result = future.result(LIMIT_S)
        except fdpool.FdpoolError as error:
            if error.may_have_run is False:
                self.never.add(number)
            raise
        self.ran.add(number)
        return result

    def do(self, number: int, fn: Any, *args: Any, pool: fdpool.Pool | None = None) -> Any:
        """Submit, and wait for the result."""
        return self.result(number, self.submit(number, fn, *args, pool=pool))


def tiny(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.tiny, world.path, number) == number * 3


def several(world: World, number: int, dice: random.Random) -> None:
    """Many at once, so that they are sent together."""
    numbers = range(number, number + dice.randint(6, 61))
    futures = [world.submit(each, tasks.tiny, world.path, each) for each in numbers]
    lost: fdpool.WorkerLost | None = None
    for each, future in zip(numbers, futures):
        try:
            assert world.result(each, future) == each * 3
        except fdpool.WorkerLost as error:
            lost = error
    if lost is not None:
        raise lost


def carrying(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.carrying, world.ledger, number) == number * 3


def large(world: World, number: int, dice: random.Random) -> None:
    data = dice.randbytes(dice.choice([100, 70_000, 300_000, 2_000_000]))
    assert world.do(number, tasks.large, world.ledger, number, data) == (number, data[::-1])


def array(world: World, number: int, dice: random.Random) -> None:
    import numpy

    values = numpy.arange(dice.choice([10, 20_000, 200_000]))
    got = world.do(number, tasks.array, world.path, number, values)
    assert int(got[-1]) == len(values) - 1 + number
    assert int(values[0]) == 0


def pipe(world: World, number: int, _dice: random.Random) -> None:
    read, write = os.pipe()
    with open(read, "rb") as mine:
        with open(write, "wb") as end:
            future = world.submit(number, tasks.through_pipe, world.ledger, number, end)
        assert world.result(number, future) == number
        assert mine.read() == number.to_bytes(8, "little")


def opens(world: World, number: int, _dice: random.Random) -> None:
    with world.do(number, tasks.opens, world.ledger, number) as file:
        assert file.read() == number.to_bytes(8, "little")


def fails(world: World, number: int, _dice: random.Random) -> None:
    error = world.submit(number, tasks.fails, world.path, number).exception(LIMIT_S)
    if isinstance(error, fdpool.FdpoolError):
        raise error
    assert isinstance(error, KeyError)
    assert error.args == (number,)
    world.ran.add(number)


def program(world: World, number: int, _dice: random.Random) -> None:
    command = ["sh", "-c", 'echo "$0" >> "$1"; echo "$0"', str(number), world.path]
    done = world.watch(world.pool.run(command, capture_output=True)).result(LIMIT_S)
    assert done.returncode < 0 or (done.returncode, done.stdout) == (0, f"{number}\n".encode()), done
    if done.returncode == 0:
        world.ran.add(number)


def program_ended(world: World, number: int, dice: random.Random) -> None:
    """One that is cancelled somewhere on its way; a disturbance may be the first to end it."""
    command = ["sh", "-c", 'echo "$0" >> "$1"; exec sleep 1000', str(number), world.path]
    future = world.pool.run(command, grace=0.05)
    world.watch(future)
    time.sleep(dice.uniform(0, 0.03))
    future.cancel()
    try:
        assert future.result(LIMIT_S).returncode < 0
    except CancelledError:
        pass


def pipeline(world: World, number: int, _dice: random.Random) -> None:
    first = ["sh", "-c", 'echo "$0" >> "$1"; echo "$0"', str(number), world.path]
    done = world.watch(world.pool.pipeline([first, ["cat"]], capture_output=True)).result(LIMIT_S)
    codes = [stage.returncode for stage in done.stages]
    assert min(codes) < 0 or (codes, done.stdout) == ([0, 0], f"{number}\n".encode()), done


def talks(world: World, number: int, dice: random.Random) -> None:
    """A program that reads and writes; a disturbance may end it in the midst of that."""
    data = dice.randbytes(dice.choice([10, 300_000]))
    command = ["sh", "-c", 'echo "$0" >> "$1"; exec cat', str(number), world.path]
    with world.pool.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, grace=0.05) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        writer = threading.Thread(target=_write_all, args=(running.stdin, data))
        writer.start()
        got = running.stdout.read()
        writer.join()
        code = running.wait(LIMIT_S)
    assert code < 0 or got == data
    if code == 0:
        world.ran.add(number)


def _write_all(end: Any, data: bytes) -> None:
    try:
        with end:
            end.write(data)
    except BrokenPipeError:
        pass  # who reads it was killed


def runs_program(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.runs_program, world.path, number) <= 0


def leaves_program(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.leaves_program, world.path, number) == number


def nested(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.nested, world.path, number) == number**2


def chunks(world: World, number: int, dice: random.Random) -> None:
    """A map, of which what comes before a lost item is right."""
    numbers = range(number, number + dice.choice([10, 300, 2000]))
    chunksize = dice.choice([None, None, 1 + len(numbers) // 10])
    got: list[int] = []
    try:
        # As far as it comes.
        got.extend(world.pool.map(tasks.tiny, [world.path] * len(numbers), numbers, chunksize=chunksize))
    finally:
        assert got == [each * 3 for each in numbers[: len(got)]]
        world.ran.update(numbers[: len(got)])


def left_map(world: World, number: int, dice: random.Random) -> None:
    """One whose results are not wanted any more after some."""
    numbers = range(number, number + 300)
    results = world.pool.map(tasks.tiny, [world.path] * 300, numbers, buffersize=dice.choice([None, 8]))
    got = list(itertools.islice(results, dice.randrange(20)))
    results.close()  # type: ignore[attr-defined]
    assert got == [each * 3 for each in numbers[: len(got)]]
    world.ran.update(numbers[: len(got)])


def cancelled(world: World, number: int, _dice: random.Random) -> None:
    future = world.submit(number, tasks.tiny, world.path, number)
    if future.cancel():
        world.never.add(number)
        try:
            future.result(LIMIT_S)
        except CancelledError:
            return
    assert world.result(number, future) == number * 3


def terminated(world: World, number: int, dice: random.Random) -> None:
    """Somewhere on its way; by an exception in it, or, where its time for that is short, with its worker."""
    future = world.submit(number, dice.choice([tasks.sleeps, tasks.spins]), world.path, number, 1000.0)
    time.sleep(dice.uniform(0, 0.02))
    ends = future.terminate(grace=dice.choice([0.0, 0.01, 5.0]))
    try:
        world.result(number, future)
    except CancelledError:
        assert ends
        return
    raise AssertionError("a task that was terminated gave a result")


def retried(world: World, number: int, _dice: random.Random) -> None:
    world.tries[number] = 3
    patient = world.pool.with_options(retries=2, retry_delay=0.01)
    assert world.do(number, tasks.tiny, world.path, number, pool=patient) == number * 3


def timed_out(world: World, number: int, dice: random.Random) -> None:
    hasty = world.pool.with_options(timeout=dice.choice([0.001, 0.02]), grace=0.05)
    try:
        world.do(number, tasks.sleeps, world.path, number, 100.0, pool=hasty)
    except fdpool.TaskTimeout:
        return
    raise AssertionError("a task that takes too long gave a result")


def came_too_late(world: World, number: int, dice: random.Random) -> None:
    """It may begin in time, or must not have run."""
    hasty = world.pool.with_options(queue_timeout=dice.choice([1e-6, 0.001, 0.01]))
    try:
        assert world.do(number, tasks.tiny, world.path, number, pool=hasty) == number * 3
    except fdpool.TaskTimeout:
        assert number in world.never


def takes_too_much(world: World, number: int, _dice: random.Random) -> None:
    frugal = world.pool.with_options(max_memory=150 << 20, grace=0.05)
    try:
        world.do(number, tasks.grows, world.path, number, pool=frugal)
    except fdpool.MemoryLimitExceeded:
        return
    raise AssertionError("a task that takes too much memory gave a result")


def logs(world: World, number: int, _dice: random.Random) -> None:
    assert world.do(number, tasks.logs, world.path, number) == number
    world.logged.add(number)


def shared(world: World, number: int, dice: random.Random) -> None:
    index = dice.randrange(1000)
    assert world.do(number, tasks.shared_item, world.path, number, world.table, index) == index * 7


#: Each kind with its weight.
KINDS = {
    tiny: 30,
    several: 6,
    carrying: 10,
    large: 8,
    array: 5,
    pipe: 10,
    opens: 8,
    fails: 6,
    program: 1,
    program_ended: 1,
    pipeline: 1,
    talks: 1,
    runs_program: 2,
    leaves_program: 1,
    nested: 0.3,
    chunks: 2,
    left_map: 2,
    cancelled: 5,
    terminated: 4,
    retried: 5,
    timed_out: 0.7,
    came_too_late: 4,
    takes_too_much: 0.5,
    logs: 4,
    shared: 5,
}
