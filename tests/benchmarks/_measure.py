"""The words in which measures are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial


@dataclass(frozen=True, slots=True)
class Settings:
    """What the driver tells a contestant.

    size: how much a round does; each measure says of what.
    step: loop count of `work.spin` that takes 20 µs on this machine now.
    """

    size: int
    step: int = 400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one round gives.

    count: units (tasks, items, bytes ...) by which the round's cost is divided.
    value: the cost of one unit if it is not the round's wall time: a time that the round took itself, bytes,
        wake-ups.
    cpu_s: CPU seconds of one unit, if not that of the whole tree during the round.
    samples: seconds of single units, for p50 and p99.
    """

    count: float = 1
    value: float | None = None
    cpu_s: float | None = None
    samples: Sequence[float] = ()


Round = Callable[[], Outcome]
Side = Callable[[Settings], AbstractContextManager[Round]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What fdpool is to reach: `ratio` times less than `rival`, or no more than `limit` of the measure's unit."""

    rival: str | None = None
    ratio: float | None = None
    limit: float | None = None


def ahead_of(rival: str, ratio: float) -> Goal:
    """`ratio` times less than `rival`; below 1 it says how much more may be."""
    return Goal(rival=rival, ratio=ratio)


def within(rival: str, times: float) -> Goal:
    """No more than `times` as much as `rival`."""
    return Goal(rival=rival, ratio=1 / times)


def at_most(limit: float) -> Goal:
    """No more than `limit`, in the measure's unit."""
    return Goal(limit=limit)


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """One row of the report: the same work, done by every side.

    unit, scale: in what one unit's cost is shown, and how much of it is 1 (a second, a byte).
    sides: contestant -> how it sets up, and what it does in a round. "fdpool" is there always.
    size, rounds: of a full run; the quick ones of `--quick`.
    mean: report the mean of all rounds, not their median: for what is 0 in most rounds, and matters in the others.
    needs: an attribute of `fdpool.Pool` without which there is nothing to measure.
    """

    name: str
    family: str
    title: str
    sides: Mapping[str, Side]
    size: int
    quick_size: int
    unit: str = "µs"
    scale: float = 1e6
    goals: Sequence[Goal] = ()
    rounds: int = 15
    quick_rounds: int = 2
    warm_up: bool = True
    mean: bool = False
    needs: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def by_peer(
    side: Callable[[str, Settings], AbstractContextManager[Round]], names: Sequence[str]
) -> dict[str, Side]:
    """The same set-up and round for each of these peers."""
    return {name: partial(side, name) for name in names}
