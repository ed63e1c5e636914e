"""Each test that docs/reliability.md names exists, and each row that it leaves without one says why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| ([THPWR]\d| \|)", line)]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
WITHOUT_TEST = {"T16, T17", "H14"}


def test_there_is_a_row_for_each_hazard() -> None:
    told = {name for row in ROWS for name in re.findall(r"\b[THPWR]\d+\b", row[0])}
    wanted = {"T": 26, "H": 15, "P": 15, "W": 6, "R": 3}
    assert told == {f"{letter}{number}" for letter, last in wanted.items() for number in range(1, last + 1)}


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    tree = ast.parse((TESTS / path).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def test_only_what_does_not_apply_or_is_not_ours_has_no_test() -> None:
    assert {row[0] for row in ROWS if "::" not in row[-1]} == WITHOUT_TEST
