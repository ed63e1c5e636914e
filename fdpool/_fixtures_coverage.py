"""Coverage of what runs in workers: measured there as it is here, and written beside the data of this process.

What it writes, `coverage combine` finds; pytest-cov does that by itself. Without coverage in this process nothing of it
is imported.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OPTIONS = ("source", "include", "omit", "branch", "concurrency")


def settings() -> dict[str, Any] | None:
    """How coverage is measured in this process, for a worker to do the same; None if it is not."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if current is None:
        return None
    found = {name: current.get_option(f"run:{name}") for name in _OPTIONS}
    return {
        **{name: value for name, value in found.items() if value},
        "data_file": os.path.abspath(str(current.get_option("run:data_file") or ".coverage")),
        "config_file": getattr(current.config, "config_file", None) or False,
    }


@contextmanager
def measuring(wanted: dict[str, Any] | None) -> Iterator[None]:
    """Runs in: a worker. Measure the block as `wanted`, and write a data file of its own at the end."""
    if wanted is None:
        yield
        return
    measurement = _started(wanted)
    try:
        yield
    finally:
        measurement.stop()
        measurement.save()


def measure_until_exit(wanted: dict[str, Any]) -> None:
    """Runs in: a worker, as its initializer. Measure until it leaves."""
    measurement = _started(wanted)

    def finish() -> None:
        measurement.stop()
        measurement.save()

    atexit.register(finish)


def _started(wanted: dict[str, Any]) -> Any:
    coverage: Any = importlib.import_module("coverage")
    measurement = coverage.Coverage(data_suffix=True, **wanted)
    measurement.start()
    return measurement
