"""The example project: two web applications, tested behind the fixtures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugin.conftest import ROOT, Outcome, command, environment


def test_the_example_project_passes_in_two_processes(tmp_path: Path) -> None:
    for module in ("flask", "starlette", "uvicorn", "waitress"):
        pytest.importorskip(module)
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "testing", folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        command("-W", "error", "-n2", plugins=["xdist"]),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    Outcome(done).assert_counts(passed=10)
