"""What the tests of logs run in workers; without pytest, which each worker would import."""

from __future__ import annotations

import logging
import time
from typing import Any


def log_numbers(name: str, count: int) -> None:
    for number in range(count):
        logging.getLogger(name).info("number %d of %s", number, name, extra={"number": number})


def flood(name: str, count: int, patience_s: float) -> float:
    """Log so many records, of which each may wait so long; returns the seconds that it took."""
    from fdpool import _logs

    _logs._PATIENCE_S = patience_s
    began = time.monotonic()
    log_numbers(name, count)
    return time.monotonic() - began


def log_error() -> None:
    try:
        raise ValueError("went wrong")
    except ValueError:
        logging.getLogger("fdpool.test").exception("caught")


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("stays here")

    def __str__(self) -> str:
        return "a text of it"


def log_awkward() -> None:
    log = logging.getLogger("fdpool.test")
    log.warning("with %s", Unpicklable())
    log.warning("extra", extra={"unpicklable": Unpicklable(), "fine": 3})
    log.warning("x" * 1_000_000)
