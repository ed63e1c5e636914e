"""The examples of testing: two applications of our own, and what Flask and Starlette publish, behind the fixtures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.plugin.conftest import ROOT, Outcome, command, environment

OTHERS = ROOT / "examples" / "testing_others" / "run.py"


def run(arguments: list[str], folder: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(300)  # a busy machine takes a minute
def test_the_example_project_passes_in_two_processes(tmp_path: Path) -> None:
    for module in ("flask", "starlette", "uvicorn", "waitress"):
        pytest.importorskip(module)
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "testing", folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = run(command("-W", "error", "-n2", plugins=["xdist"]), folder, {})
    Outcome(done).assert_counts(passed=10)


@pytest.mark.timeout(300)  # a busy machine takes a minute
def test_what_flask_and_starlette_publish_as_examples_passes_behind_the_fixtures(tmp_path: Path) -> None:
    """Flask's with their own tests, unchanged, whose clients are made to speak over sockets."""
    for module in ("flask", "starlette", "uvicorn", "waitress", "websockets"):
        pytest.importorskip(module)
    done = run([sys.executable, str(OTHERS), "-p", "fdpool.pytest_plugin", "-q"], tmp_path, {})
    if done.returncode == 77:
        pytest.skip(done.stdout.removeprefix("skipped: ").strip())
    outcome = Outcome(done)
    outcome.assert_counts(passed=53)
    outcome.assert_says("47 requests of Flask's test clients went over sockets")


def test_without_a_network_the_published_examples_are_skipped_with_the_reason(tmp_path: Path) -> None:
    nothing = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = run([sys.executable, str(OTHERS)], tmp_path, {**nothing, "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 77
    assert done.stdout.startswith("skipped: pip could not fetch what requirements.txt names: ERROR: ")
    assert "flask==3.1.3" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
