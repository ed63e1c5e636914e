"""Running a module of the tests, or a script, as a program."""

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


def run_script(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`python program.py` of this code, which finds fdpool; for a minute at most."""
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script)],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
    )
