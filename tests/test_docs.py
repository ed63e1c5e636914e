"""The documents agree with the code: the slot table, the names, the links, and every piece of Python in the guides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool._server import states as server_states
from fdpool._slots import TABLE, Event, State

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def slot_table() -> str:
    """`_slots.TABLE` in Markdown."""
    return table_of(State, Event, TABLE)


def table_of(states: Any, events: Any, table: Any) -> str:
    """A table of states and events in Markdown; a dash where it is a defect of the caller."""
    rows = [["", *(event.value for event in events)], ["---"] * (len(events) + 1)]
    for state in states:
        cells = (table[state, event] for event in events)
        rows.append([f"**{state.value}**", *("—" if cell is None else cell.value for cell in cells)])
    return "".join(f"|{'|'.join(f' {cell} ' if cell != '---' else cell for cell in row)}|\n" for row in rows)


def layers() -> str:
    """The layers that the import-linter checks, of the package and of each package in it, from the top down."""
    text = (ROOT / "pyproject.toml").read_text()
    checked = re.findall(r'^containers = \["fdpool\.?(\w*)"\]$.*?^layers = \[\n(.*?)^\]', text, re.S | re.M)
    assert len(checked) == 1 + sum(path.is_dir() for path in (ROOT / "fdpool").glob("_[a-z]*"))
    parts = []
    for package, ranks in checked:
        names = [line.strip().strip('",').replace(" | ", "   ") for line in ranks.splitlines()]
        parts.append("".join([f" in {package}:\n" if package else "", *(f" {rank}\n" for rank in names)]))
    return "```\n" + "\n".join(parts) + "```\n"


def server_table() -> str:
    """`_server.states.TABLE` in Markdown."""
    return table_of(server_states.State, server_states.Event, server_states.TABLE)


GENERATED = {"slot table": slot_table, "layers": layers, "server table": server_table}


def regenerate(text: str) -> str:
    """The design with what is generated in it made anew."""
    for name, make in GENERATED.items():
        begin, rest = text.split(f"<!-- {name} -->\n")
        text = f"{begin}<!-- {name} -->\n{make()}<!-- end of {name} -->{rest.split(f'<!-- end of {name} -->')[1]}"
    return text


def test_what_the_design_shows_of_the_code_is_generated_from_it() -> None:
    text = (DOCS / "design.md").read_text()
    assert text == regenerate(text), "run `python -m tests.test_docs`"


@pytest.mark.parametrize("name", fdpool.__all__)
def test_the_reference_has_every_public_name(name: str) -> None:
    assert (
        f"`{name}" in (DOCS / "reference.md").read_text()
        or f"fdpool.{name}" in (DOCS / "reference.md").read_text()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r"- (\S+\.md)", navigation)) == {str(page.relative_to(DOCS)) for page in PAGES[1:]}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_as_it_is_written(page: Path, tmp_path: Path) -> None:
    """All of a page is one program. (Files that a reader may leave to the collector are left to it.)"""
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
    (tmp_path / "page.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "page.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout
    assert done.returncode == 0


def test_the_changes_have_a_place_for_the_next_and_this_version() -> None:
    text = (DOCS / "changelog.md").read_text()
    assert text.index("## Unreleased") < text.index(f"## {fdpool.__version__}")


if __name__ == "__main__":
    (DOCS / "design.md").write_text(regenerate((DOCS / "design.md").read_text()))
