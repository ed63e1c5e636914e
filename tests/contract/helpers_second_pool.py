"""What the tests of second pools run in workers; without pytest, which each worker would import."""

from __future__ import annotations

import os
import sys


def name_found() -> str:
    import found_by_relative_path  # type: ignore[import-not-found]

    return str(found_by_relative_path.NAME)


def has_colorsys() -> bool:
    return "colorsys" in sys.modules


def what_a_task_finds() -> tuple[str, str | None, int, tuple[int, int]]:
    umask = os.umask(0)
    os.umask(umask)
    return os.getcwd(), os.environ.get("FDPOOL_TEST"), umask, (os.fstat(1).st_dev, os.fstat(1).st_ino)
