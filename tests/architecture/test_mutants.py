"""The excuses of mutants that nobody kills hold for lines that are there."""

import json
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT

EXCUSES: dict[str, dict[str, str]] = json.loads((ROOT / "tests/mutants.json").read_text(encoding="utf-8"))


def stale(excuses: dict[str, str], source: str) -> list[str]:
    """The changes whose removed lines are not in `source`."""
    removed = {
        change: [line[1:] for line in change.split("\n") if line.startswith("-")] for change in excuses
    }
    present = set(source.split("\n"))
    return [change for change, lines in removed.items() if not set(lines) <= present]


@pytest.mark.parametrize("module", sorted(EXCUSES))
def test_excuses__are_for_lines_that_the_module_still_has(module: str) -> None:
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert stale(EXCUSES[module], source) == []


def test_excuses__of_lines_that_are_gone_are_found() -> None:
    excuses = {"-    a = 1\n+    a = 2": "why", "-    b = 1\n+    b = 2": "why"}
    assert stale(excuses, "def f():\n    a = 1\n") == ["-    b = 1\n+    b = 2"]
