"""Classes of a script travel by value, and the script's own stays what it is."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.modules import run_script

CLASSES = """
import dataclasses, enum, sys
import fdpool

SCALE = 1

class Point:
    unit = "m"
    def __init__(self, x): self.x = x
    def scaled(self): return self.x * SCALE, self.unit
    @staticmethod
    def scale(): return SCALE
    @classmethod
    def made(cls, x): return cls(x)
    @property
    def double(self): return 2 * self.x * SCALE

@dataclasses.dataclass
class Pair:
    one: int
    other: Point = dataclasses.field(default_factory=lambda: Point(7))
    def total(self): return self.one + self.other.x

class Colour(enum.Enum):
    RED = 1
    def told(self): return f"{self.name} {SCALE}"

class Sub(Point):
    def scaled(self): return ("sub", *super().scaled())

def point(x): return Point(x)
def pair(x): return Pair(x)
def red(): return Colour.RED
def sub(x): return Sub.made(x)
def is_as(own): return all(vars(cls)[name] is value for cls in own for name, value in own[cls].items())
def seen(p): return p.scaled(), p.double, type(p).scale()
def change(p):
    type(p).unit = "changed"
    return p
"""


def run(folder: Path, body: str) -> None:
    done = run_script(folder, CLASSES + textwrap.dedent(body) + "\nprint('done')\n")
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("start_method", ["fresh", "fork"])
def test_the_scripts_own_classes_are_left_alone_by_results(start_method: str, tmp_path: Path) -> None:
    """cloudpickle knows the class of a result by an id, and would put the worker's functions into it, with the globals
    that those had there."""
    body = f"""
    own = {{cls: dict(vars(cls)) for cls in (Point, Pair, Colour, Sub)}}
    with fdpool.Pool(1, start_method={start_method!r} if {start_method!r} == "fork" else None) as pool:
        for _ in range(4):
            results = [pool.submit(each, *args).result() for each, *args in ((point, 5), (pair, 1), (red,), (sub, 2))]
            changed = pool.submit(change, Point(3)).result()
            assert [type(each) for each in results] == [Point, Pair, Colour, Sub]
            assert results[1] == Pair(1, results[1].other) and results[2] is Colour.RED
            assert is_as(own)
        SCALE = 10
        assert results[0].scaled() == Point(5).scaled() == (50, "m")
        assert results[1].total() == 8 and type(results[1].other) is Point
        assert results[2].told() == "RED 10"
        assert results[3].scaled() == ("sub", 20, "m")
        assert changed.scaled() == (30, "m")
    """
    run(tmp_path, body)


@pytest.mark.parametrize("start_method", ["fresh", "fork"])
def test_what_the_script_changes_in_a_class_goes_with_the_next_task(
    start_method: str, tmp_path: Path
) -> None:
    body = f"""
    with fdpool.Pool(1, start_method={start_method!r} if {start_method!r} == "fork" else None) as pool:
        for number in range(12):
            if number % 4 == 0:
                SCALE = number + 1
            elif number % 4 == 1:
                Point.unit = f"unit {{number}}"
            elif number % 4 == 2:
                Point.scaled = lambda self, number=number: (number, self.unit, SCALE)
            for p in (Point(2), Sub(3)):
                for _ in range(3):
                    assert pool.submit(seen, p).result() == seen(p), number
                    assert pool.submit(p.scaled).result() == p.scaled(), number
                assert pool.submit(point, 4).result().scaled() == Point(4).scaled()
    """
    run(tmp_path, body)


def test_what_a_task_changes_in_a_class_is_not_there_for_the_next(tmp_path: Path) -> None:
    body = """
    with fdpool.Pool(1) as pool:
        for _ in range(6):
            pool.submit(change, Point(1)).result()
            assert pool.submit(seen, Point(1)).result() == ((1, "m"), 2, 1)
    """
    run(tmp_path, body)


def test_classes_go_through_a_pool_in_a_task_and_come_back(tmp_path: Path) -> None:
    body = """
    def through(p):
        with fdpool.Pool(1) as inner:
            made = inner.submit(point, 9).result()
            return [made.scaled(), inner.submit(seen, p).result(), inner.submit(change, p).result()]

    own = {Point: dict(vars(Point))}
    with fdpool.Pool(1) as pool:
        for _ in range(2):
            scaled, told, p = pool.submit(through, Point(4)).result()
            assert (scaled, told) == ((9, "m"), seen(Point(4)))
            assert type(p) is Point and is_as(own)
    """
    run(tmp_path, body)


def test_whatever_changes_and_whoever_is_killed_each_task_has_what_there_was_as_it_was_submitted(
    tmp_path: Path,
) -> None:
    """Functions and classes are pickled once, and known where they have been before; workers are killed, too."""
    body = """
    import contextlib, os, random, signal

    held, named = [0], {"a": 1}

    def helper(x): return x * SCALE + named["a"] + held[-1]
    def work(p): return p.scaled(), helper(p.x), vars(type(p).made(SCALE))
    def counts():
        global SCALE
        SCALE += 1
        return SCALE

    def change(dice):
        global SCALE
        which = dice.randrange(5)
        if which == 0: SCALE = dice.randint(1, 9)
        elif which == 1: named["a"] = dice.randint(1, 9)
        elif which == 2: held[:] = [*held[-2:], dice.randint(1, 9)]
        elif which == 3: Point.unit = f"{dice.random()}"
        else: Sub.made = classmethod(lambda cls, x, by=dice.random(): cls(x + by))

    dice, done = random.Random(1), 0
    with fdpool.Pool(2) as pool:
        for turn in range(60):
            tasks = []
            for number in range(dice.randint(1, 40)):
                if dice.random() < 0.1:
                    change(dice)
                p = dice.choice((Point, Sub))(number)
                tasks.append((pool.submit(work, p), work(p)))
                tasks.append((pool.submit(p.scaled), p.scaled()))
                tasks.append((pool.submit(counts), SCALE + 1))
                tasks.append((pool.submit(lambda: helper(number)), helper(number)))
            if turn % 6 == 5:
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(dice.choice(pool.worker_pids()), signal.SIGKILL)
            for future, expected in tasks:
                try:
                    assert future.result(30) == expected
                    done += 1
                except fdpool.WorkerLost:
                    pass
    assert done > 3000, done
    """
    run(tmp_path, body)
