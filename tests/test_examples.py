"""The examples: each in a fresh interpreter, its output compared with the file beside it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def needs(example: Path) -> list[str]:
    """The packages that an example uses beside fdpool, as it says in a line of its own: `Needs: flask, waitress`."""
    said = re.search("^Needs: (.+)$", example.read_text(), re.MULTILINE)
    return said[1].split(", ") if said else []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_what_is_kept_beside_it(example: Path, tmp_path: Path) -> None:
    if missing := [name for name in needs(example) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"it needs {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="it comes with systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """As they are, but for the program, which is looked for."""
    for unit in (FOLDER / "systemd").iterdir():
        text = unit.read_text().replace("/srv/shop/venv/bin/fdpool", "/bin/true").replace("/srv/shop", "/")
        (tmp_path / unit.name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert not [line for line in done.stderr.splitlines() if "shop" in line]
    assert done.returncode == 0, done.stderr
