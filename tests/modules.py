"""Running a module of the tests as a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m NAME ARGUMENT ...` in the project's folder, without input; for a minute at most."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
