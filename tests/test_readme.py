"""The README: its example runs as written, and its two commands are what they claim to be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(name: str) -> str:
    """The one line in the shell block that the comment `name` stands directly before."""
    found = re.search(rf"^<!-- {name} -->\n```sh\n(.*?)^```$", README, re.S | re.M)
    assert found is not None
    return found[1]


def run(arguments: list[str] | str, **options: bool | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        arguments,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)
    assert len([line for line in example.splitlines() if line]) <= 14
    (tmp_path / "example.py").write_text(example)
    done = run([sys.executable, "-W", "error", "example.py"], cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("b'HELLO FROM HERE' answered\n\n", "")


@pytest.mark.parametrize("name", ["main job", "test command"])
def test_a_command_is_one_line_that_makes_its_own_environment(name: str) -> None:
    line = command(name)
    assert line.count("\n") == 1
    folder = re.match(r"python3 -m venv (\S+) && \1/bin/pip install -q ", line)
    assert folder is not None
    assert folder[1].startswith(".venv")  # which .gitignore knows


def test_the_two_environments_are_different_ones() -> None:
    assert command("main job").split()[3] != command("test command").split()[3]


def test_the_main_job_prints_a_line_for_each_of_its_files() -> None:
    job = command("main job").rpartition(" && ")[2]
    assert job.startswith(".venv/bin/fdpool run ")
    here = shlex.join([sys.executable, "-W", "error", "-m", "fdpool"])
    done = run(job.replace(".venv/bin/fdpool", here), cwd=ROOT, shell=True)
    assert (done.stderr, done.returncode) == ("", 0)
    names = [
        "README.md",
        "LICENSE",
        *sorted(f"fdpool/{path.name}" for path in (ROOT / "fdpool").glob("*.py")),
    ]
    lines = done.stdout.splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(names)
    assert lines[0].split() == [
        str(README.count("\n")),
        "lines",
        str(len(README.split())),
        "words",
        "README.md",
    ]


def test_the_test_command_runs_the_tests() -> None:
    assert command("test command").endswith(".venv-test/bin/python -m pytest -n auto\n")
