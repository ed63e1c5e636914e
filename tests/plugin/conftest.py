"""What the tests of the plugin need: a project of one file, and a run of pytest over it in a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., "Outcome"]


class Outcome:
    """What became of a run: the numbers of passed, failed and so on, and everything it printed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.text = done.stdout + done.stderr
        last = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), "")
        words = last.replace(",", "").replace("=", "").split()
        self.counts = {
            name.rstrip("s") if name in ("errors", "warnings") else name: int(count)
            for count, name in itertools.pairwise(words)
            if count.isdigit()
        }

    def assert_counts(self, **expected: int) -> None:
        """Exactly these outcomes; warnings are not counted."""
        found = {name: count for name, count in self.counts.items() if name != "warning"}
        assert found == expected, self.text

    def assert_says(self, *texts: str) -> None:
        """Each of them, in this order."""
        rest = self.text
        for text in texts:
            assert text in rest, f"{text!r} is not in\n{self.text}"
            rest = rest.partition(text)[2]


@pytest.fixture
def run_pytest(tmp_path: Path) -> Run:
    """Run pytest on a test file of the given text: `run_pytest(text, *arguments, plugins=["xdist"], env=...)`."""

    def run(
        text: str,
        *arguments: str,
        conftest: str = "",
        ini: str = "",
        env: Mapping[str, str] | None = None,
        plugins: Sequence[str] = (),
        **options: object,
    ) -> Outcome:
        write_project(tmp_path, text, conftest, ini)
        return Outcome(
            subprocess.run(  # type: ignore[call-overload]
                command(*arguments, plugins=plugins),
                cwd=tmp_path,
                env=environment(env),
                **{"stdin": subprocess.DEVNULL, "capture_output": True, **options},
                text=True,
                timeout=110,
                check=False,
            )
        )

    return run


def write_project(folder: Path, text: str, conftest: str = "", ini: str = "") -> None:
    """A project of one test file, `test_it.py`."""
    (folder / "test_it.py").write_text(textwrap.dedent(text))
    (folder / "conftest.py").write_text(textwrap.dedent(conftest))
    (folder / "pytest.ini").write_text("[pytest]\n" + textwrap.dedent(ini))


def command(*arguments: str, plugins: Sequence[str] = ()) -> list[str]:
    """The command that runs pytest with the plugin.

    Args:
        plugins: of others, by their entry points. No others are loaded, whatever is installed: they change how a run
            goes, and take longer to import than most of these runs take.
    """
    loaded = [
        argument
        for name in (*plugins, "fdpool.pytest_plugin", "no:cacheprovider")
        for argument in ("-p", name)
    ]
    return [sys.executable, "-m", "pytest", *loaded, *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a run that knows nothing of the one that it is started by."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **(extra or {})}
