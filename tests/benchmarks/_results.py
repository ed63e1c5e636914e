"""Rounds become medians, ratios within a round, and verdicts. What is saved as JSON is made and read here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ._measure import Goal, Measure


@dataclass(slots=True)
class SideResult:
    """What a side's rounds gave: the cost of a unit, in wall time (or bytes ...) and in CPU seconds."""

    values: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    p50: float | None = None
    p99: float | None = None
    samples: list[float] = field(default_factory=list)

    def add(self, outcome: dict[str, Any]) -> None:
        self.values.append(outcome["value"])
        self.cpus.append(outcome["cpu"])
        self.samples += outcome["samples"]

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)

    def settle(self) -> None:
        """Replace the samples, which are many, by what is reported of them."""
        if self.samples:
            ordered = sorted(self.samples)
            self.p50 = ordered[len(ordered) // 2]
            self.p99 = ordered[len(ordered) * 99 // 100]
            self.samples = []


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles, of `count` rounds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread | None:
        if not numbers:
            return None
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0], 1)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high, len(numbers))

    @property
    def error(self) -> float:
        """The median's standard error, as the quartiles of a normal distribution would have it."""
        return 1.253 * (self.high - self.low) / 1.349 / math.sqrt(self.count)


@dataclass(slots=True)
class MeasureResult:
    """One measure: what it was, where it was made, and what each side did."""

    name: str
    family: str
    title: str
    unit: str
    scale: float
    size: int
    goals: list[Goal]
    labels: dict[str, str]
    sides: dict[str, SideResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    mean: bool = False

    @classmethod
    def of(cls, measure: Measure, size: int) -> MeasureResult:
        return cls(
            measure.name,
            measure.family,
            measure.title,
            measure.unit,
            measure.scale,
            size,
            list(measure.goals),
            dict(measure.labels),
            mean=measure.mean,
        )

    def value(self, side: str) -> float:
        """What a side's rounds gave, in the measure's unit: their median, or their mean."""
        found = self.sides[side]
        return (statistics.fmean(found.values) if self.mean else found.value) * self.scale

    def ratio(self, rival: str, cost: str = "values") -> Spread | None:
        """How many times as much `rival` took as fdpool in the same round; None if either is missing or 0."""
        if rival not in self.sides or "fdpool" not in self.sides:
            return None
        own, other = getattr(self.sides["fdpool"], cost), getattr(self.sides[rival], cost)
        if min(own) <= 0 or min(other) < 0:
            return None
        return Spread.of([theirs / ours for theirs, ours in zip(other, own)])

    def reached(self, goal: Goal) -> tuple[Spread | None, str]:
        """What was reached (a ratio, or fdpool's value in the measure's unit), and whether that is enough: "yes", "no",
        or "level" if the goal is missed by less than twice the median's standard error. Of a mean that is "no": a
        round that is above the limit is enough to tell."""
        if goal.limit is not None:
            if "fdpool" not in self.sides:
                return None, "–"
            spread = Spread.of([value * self.scale for value in self.sides["fdpool"].values])
            if spread is None:
                return None, "–"
            missed_by = self.value("fdpool") - goal.limit
            if self.mean:
                return spread, "yes" if missed_by <= 0 else "no"
            return spread, _verdict(missed_by, spread)
        assert goal.rival is not None
        assert goal.ratio is not None
        spread = self.ratio(goal.rival)
        if spread is None:
            return None, "–"
        return spread, _verdict(goal.ratio - spread.median, spread)

    def as_json(self) -> dict[str, Any]:
        for side in self.sides.values():
            side.settle()
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> MeasureResult:
        result = cls(**saved)
        result.goals = [Goal(**goal) for goal in saved["goals"]]
        result.sides = {name: SideResult(**side) for name, side in saved["sides"].items()}
        return result


def _verdict(missed_by: float, spread: Spread) -> str:
    return "yes" if missed_by <= 0 else "level" if missed_by < 2 * spread.error else "no"
