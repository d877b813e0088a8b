"""Budgets: a file has 400 lines, a function 50. Migrations are exempt, nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, name_of, python_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "managers"}


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield (name, lines) of every function over the budget, decorators not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def exempt(path: Path) -> bool:
    return "service/db/migrations/versions/" in name_of(path)


@pytest.mark.parametrize("path", [p for p in python_files() if not exempt(p)], ids=name_of)
def test_sizes__file_and_functions_stay_within_budget(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES, f"{name_of(path)}: split it by what it does"
    assert not list(long_functions(source)), f"{name_of(path)}: name the steps"


def test_long_functions__counts_the_whole_body() -> None:
    body = "def f():\n" + "    x = 1\n" * 50
    assert list(long_functions(body)) == [("f", 51)]
    assert not list(long_functions("def f():\n" + "    x = 1\n" * 49))


def test_names__no_module_is_a_drawer_for_anything() -> None:
    everything = [
        p
        for package in ("cim_core", "service", "workers", "scripts", "benchmarks", "tests")
        for p in (ROOT / package).rglob("*")
    ]
    assert not [name_of(p) for p in everything if p.stem.lower() in FORBIDDEN_NAMES]
