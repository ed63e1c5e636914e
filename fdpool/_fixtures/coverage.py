"""Coverage of what runs in workers: measured there as it is here, and written beside the data of this process.

What it writes, `coverage combine` finds; pytest-cov does that by itself. Without coverage in this process nothing of it
is imported.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_OPTIONS = ("source", "include", "omit", "branch", "concurrency")

# Where the run was started: what the options say is meant from there, and a test may have gone elsewhere.
_folder: str | None = None


def begin_in(folder: str) -> None:
    """Take relative paths in coverage's options to be meant from `folder`; in a run inside a run, from the outer's."""
    global _folder
    _folder = _folder or folder


def settings() -> dict[str, Any] | None:
    """How coverage is measured in this process, for a worker to do the same; None if it is not."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if current is None:
        return None
    found = {name: current.get_option(f"run:{name}") for name in _OPTIONS}
    return {
        **{name: value for name, value in found.items() if value},
        "folder": _folder or os.getcwd(),
        "data_file": _data_file(current),
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


def save_fork() -> None:
    """Runs in: a fork of a process that is measured, at its end. Write what was measured into a file of its own."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if coverage is None or current is None:
        return
    current.stop()
    data = current.get_data()
    own = coverage.CoverageData(basename=_data_file(current), suffix=True)
    own.update(data)
    own.close()


def _data_file(measurement: Any) -> str:
    name = str(measurement.get_option("run:data_file") or ".coverage")
    return os.path.join(_folder or os.getcwd(), name)


def with_pool_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a pool, with an initializer that measures coverage before it does what it did."""
    wanted = settings()
    if wanted is None:
        return options
    first = options.get("initializer"), options.get("initargs", ())
    return {**options, "initializer": _initialize, "initargs": (wanted, *first)}


def _initialize(wanted: dict[str, Any], first: Callable[..., object] | None, args: tuple[Any, ...]) -> None:
    measure_until_exit(wanted)
    if first is not None:
        first(*args)


def _started(wanted: dict[str, Any]) -> Any:
    coverage: Any = importlib.import_module("coverage")
    options = dict(wanted)
    back = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.chdir(options.pop("folder"))
        measurement = coverage.Coverage(data_suffix=True, **options)
        measurement.start()
    finally:
        os.fchdir(back)
        os.close(back)
    return measurement
