"""The registry of what is measured."""

from __future__ import annotations

from .._measure import Measure
from . import arrays, footprint, mapping, programs, recovery, sockets, starting, tasks, workers

ALL: tuple[Measure, ...] = (
    *tasks.MEASURES,
    *mapping.MEASURES,
    *arrays.MEASURES,
    *sockets.MEASURES,
    *starting.MEASURES,
    *recovery.MEASURES,
    *footprint.MEASURES,
    *workers.MEASURES,
    *programs.MEASURES,
)


def by_name(name: str) -> Measure:
    return next(measure for measure in ALL if measure.name == name)
