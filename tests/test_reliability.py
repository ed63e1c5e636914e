"""Each test that docs/reliability.md names exists and names its row, and each row without a test says why."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| [THPWRFS]\d", line)]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
NAMED = sorted(set(TEST.findall(PAGE)))
HELD = [(row[0], *test) for row in ROWS for test in TEST.findall(row[-1])]
WITHOUT_TEST = {"T16, T17", "H14"}


def test_there_is_one_row_for_each_hazard() -> None:
    told = [name for row in ROWS for name in re.findall(r"\b[THPWRFS]\d+\b", row[0])]
    wanted = {"T": 26, "H": 15, "P": 15, "W": 7, "R": 3, "F": 8, "S": 14}
    assert sorted(told) == sorted(
        f"{letter}{number}" for letter, last in wanted.items() for number in range(1, last + 1)
    )


@functools.cache
def module_of(path: str) -> ast.Module:
    return ast.parse((TESTS / path).read_text())


def find(module: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            return node
    return None


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    assert find(module_of(path), name) is not None


@pytest.mark.parametrize(("hazard", "path", "name"), HELD, ids=[f"{row}-{name}" for row, _, name in HELD])
def test_a_test_says_itself_which_hazard_it_holds(hazard: str, path: str, name: str) -> None:
    """In its docstring, or its module's: so that who changes it knows of the row."""
    module = module_of(path)
    test = find(module, name)
    assert test is not None
    said = f"{ast.get_docstring(test)} {ast.get_docstring(module)}"
    assert hazard in re.findall(r"\b[A-Z]\d+\b", said)


def test_only_what_does_not_apply_or_is_not_ours_has_no_test() -> None:
    assert {row[0] for row in ROWS if "::" not in row[-1]} == WITHOUT_TEST
