"""Everything that a task of a chaos may be: how each is submitted, and what is right for it to give.

A kind is a function that submits one task, waits for it, and asserts that its result is right. What a disturbance may
do to a task is raised: `WorkerLost`, and, for want of descriptors, `OSError` and `FdTransferError`.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import fdpool

from . import tasks

#: How long a result may take; a task that takes longer hangs.
LIMIT_S = 60.0


@dataclass
class World:
    """What all kinds have in common.

    Attributes:
        ledger: open for appending; its path is for tasks that carry no descriptor.
        called_back: how often each future did; by a key, as a future would keep its result.
        never: tasks that must not have run: cancelled, or refused.
        tries: tasks that may have run more often than once.
    """

    pool: fdpool.Pool
    ledger: Any
    path: str
    table: Any
    called_back: dict[int, int] = field(default_factory=dict)
    keys: Iterator[int] = field(default_factory=itertools.count)
    never: set[int] = field(default_factory=set)
    tries: dict[int, int] = field(default_factory=dict)

    def watch(self, future: Future[Any]) -> Future[Any]:
        key = next(self.keys)
        self.called_back[key] = 0

        def count(_: Future[Any]) -> None:
            self.called_back[key] += 1

        future.add_done_callback(count)
        return future

    def result(self, number: int, future: Future[Any]) -> Any:
        """The result; notes what an error says of whether the task has run."""
        try:
            return self.watch(future).result(LIMIT_S)
        except fdpool.FdpoolError as error:
            if error.may_have_run is False:
                self.never.add(number)
            raise


def tiny(world: World, number: int, _dice: random.Random) -> None:
    assert world.result(number, world.pool.submit(tasks.tiny, world.path, number)) == number * 3


def several(world: World, number: int, dice: random.Random) -> None:
    """Many at once, so that they are sent together. Only the first has a mark of its own."""
    first = world.watch(world.pool.submit(tasks.tiny, world.path, number))
    others = [world.watch(world.pool.submit(pow, n, 2)) for n in range(dice.randint(5, 60))]
    lost = 0
    for n, future in enumerate(others):
        try:
            assert future.result(LIMIT_S) == n * n
        except fdpool.WorkerLost:
            lost += 1
    assert first.result(LIMIT_S) == number * 3


def carrying(world: World, number: int, _dice: random.Random) -> None:
    assert world.result(number, world.pool.submit(tasks.carrying, world.ledger, number)) == number * 3


def large(world: World, number: int, dice: random.Random) -> None:
    data = dice.randbytes(dice.choice([100, 70_000, 300_000, 2_000_000]))
    got = world.result(number, world.pool.submit(tasks.large, world.ledger, number, data))
    assert got == (number, data[::-1])


def array(world: World, number: int, dice: random.Random) -> None:
    import numpy

    values = numpy.arange(dice.choice([10, 20_000, 200_000]))
    got = world.result(number, world.pool.submit(tasks.array, world.path, number, values))
    assert int(got[-1]) == len(values) - 1 + number
    assert int(values[0]) == 0


def pipe(world: World, number: int, _dice: random.Random) -> None:
    read, write = os.pipe()
    with open(read, "rb") as mine:
        with open(write, "wb") as end:
            future = world.pool.submit(tasks.through_pipe, world.ledger, number, end)
        assert world.result(number, future) == number
        assert mine.read() == number.to_bytes(8, "little")


def opens(world: World, number: int, _dice: random.Random) -> None:
    with world.result(number, world.pool.submit(tasks.opens, world.ledger, number)) as file:
        assert file.read() == number.to_bytes(8, "little")


def fails(world: World, number: int, _dice: random.Random) -> None:
    error = world.watch(world.pool.submit(tasks.fails, world.path, number)).exception(LIMIT_S)
    if isinstance(error, fdpool.FdpoolError):
        raise error
    assert isinstance(error, KeyError)
    assert error.args == (number,)


def program(world: World, number: int, _dice: random.Random) -> None:
    done = world.watch(world.pool.run(["echo", str(number)], capture_output=True)).result(LIMIT_S)
    assert done.returncode < 0 or (done.returncode, done.stdout) == (0, f"{number}\n".encode())


def runs_program(world: World, number: int, _dice: random.Random) -> None:
    assert world.result(number, world.pool.submit(tasks.runs_program, world.path, number)) <= 0


def leaves_program(world: World, number: int, _dice: random.Random) -> None:
    assert world.result(number, world.pool.submit(tasks.leaves_program, world.path, number)) == number


def nested(world: World, number: int, _dice: random.Random) -> None:
    assert world.result(number, world.pool.submit(tasks.nested, world.path, number)) == number**2


def chunks(world: World, number: int, dice: random.Random) -> None:
    """A map, of which what comes before a lost item is right."""
    count = dice.choice([10, 300, 2000])
    got: list[int] = []
    try:
        got.extend(world.pool.map(pow, range(count), [2] * count))  # as far as it comes
    finally:
        assert got == [n * n for n in range(len(got))]
    tasks_done = world.pool.submit(tasks.tiny, world.path, number)
    assert world.result(number, tasks_done) == number * 3


def cancelled(world: World, number: int, _dice: random.Random) -> None:
    future = world.watch(world.pool.submit(tasks.tiny, world.path, number))
    if future.cancel():
        world.never.add(number)
        try:
            future.result(LIMIT_S)
        except CancelledError:
            return
    assert future.result(LIMIT_S) == number * 3


def retried(world: World, number: int, _dice: random.Random) -> None:
    world.tries[number] = 3
    patient = world.pool.with_options(retries=2, retry_delay=0.01)
    assert world.result(number, patient.submit(tasks.tiny, world.path, number)) == number * 3


def timed_out(world: World, number: int, _dice: random.Random) -> None:
    hasty = world.pool.with_options(timeout=0.02, grace=0.05)
    try:
        world.watch(hasty.submit(tasks.sleeps, world.path, number, 100.0)).result(LIMIT_S)
    except fdpool.TaskTimeout:
        return
    raise AssertionError("a task that takes too long gave a result")


def shared(world: World, number: int, dice: random.Random) -> None:
    index = dice.randrange(1000)
    future = world.pool.submit(tasks.shared_item, world.path, number, world.table, index)
    assert world.result(number, future) == index * 7


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
    runs_program: 2,
    leaves_program: 1,
    nested: 0.3,
    chunks: 2,
    cancelled: 5,
    retried: 5,
    timed_out: 0.7,
    shared: 5,
}
