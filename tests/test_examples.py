"""The examples: each in a fresh interpreter, its output compared with the file beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

#: Here a worker lets a file go by without closing it, as it has given it away.
LETS_GO = {"open_in_worker"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_what_is_kept_beside_it(example: Path, tmp_path: Path) -> None:
    flags = ["-W", "error"]
    if example.stem in LETS_GO:
        flags += ["-W", "ignore::ResourceWarning"]
    done = subprocess.run(
        [sys.executable, *flags, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == example.with_suffix(".out").read_text()
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_every_example_has_its_output_and_every_output_its_example() -> None:
    assert {path.stem for path in EXAMPLES} == {path.stem for path in FOLDER.glob("*.out")}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_begins_by_saying_what_it_shows(example: Path) -> None:
    assert example.read_text().startswith('"""')
    assert example.stem in (FOLDER.parent / "docs" / "index.md").read_text()
