"""What may stand in the project's text, code and documents alike."""

import re
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, name_of, text_files

LOCK_FILES = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "pylock.toml", "package-lock.json"}
INDEX_ADDRESS = re.compile(
    r"--(extra-)?index-url|^\s*(extra-)?index-url\s*=|://\S+/simple\b|files\.pythonhosted"
)
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/")
OPEN_POINT = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")


def hits(pattern: re.Pattern[str], path: Path) -> list[str]:
    """Lines of a file that match, as `file:line: text`."""
    lines = path.read_text(errors="replace").splitlines()
    return [f"{name_of(path)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)]


def all_hits(pattern: re.Pattern[str]) -> list[str]:
    # This file names what it forbids.
    return [hit for path in text_files() if path != Path(__file__) for hit in hits(pattern, path)]


def test_text__no_lock_file() -> None:
    assert not [name_of(p) for p in text_files() if p.name in LOCK_FILES]


def test_text__no_package_index_address() -> None:
    assert not all_hits(INDEX_ADDRESS)


def test_text__no_path_of_one_machine() -> None:
    assert not all_hits(MACHINE_PATH)


def test_text__an_open_point_names_its_issue() -> None:
    found = set(all_hits(OPEN_POINT))
    assert not found, "write the number of its issue behind it, in brackets"


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (INDEX_ADDRESS, "pip install --index-url https://example.org"),
        (MACHINE_PATH, "cd /root/project"),
        (OPEN_POINT, "# TODO: later"),
    ],
)
def test_text__each_pattern_finds_its_target(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


def test_constraints__are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [line for line in pins if not re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+", line)]
    names = [line.split("==")[0] for line in pins]
    assert names == sorted(set(names))


@pytest.mark.parametrize("path", [p for p in text_files() if p.suffix == ".md"], ids=name_of)
def test_documents__relative_links_lead_somewhere(path: Path) -> None:
    targets = [t for t in LINK.findall(path.read_text()) if "://" not in t and not t.startswith("mailto:")]
    assert not [t for t in targets if not (path.parent / t).exists()]


def test_documents__name_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"`make (\w+)", path.read_text())) <= targets
