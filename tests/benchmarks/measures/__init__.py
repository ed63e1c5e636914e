"""The registry of what is measured. A contestant imports its own family only: its memory and its start count."""

from __future__ import annotations

import importlib

from .._measure import Measure

FAMILIES = (
    "tasks",
    "mapping",
    "arrays",
    "sockets",
    "starting",
    "recovery",
    "footprint",
    "workers",
    "programs",
    "servers",
    "fixtures",
)


def of(family: str) -> tuple[Measure, ...]:
    """The measures of one file."""
    found: tuple[Measure, ...] = importlib.import_module(f"{__name__}.{family}").MEASURES
    return found


def every() -> dict[Measure, str]:
    """All measures in order, each with its family."""
    return {measure: family for family in FAMILIES for measure in of(family)}
