"""The files of this project, for the tests that look at all of them."""

from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("cim_core", "service", "workers", "scripts", "benchmarks", "tests")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ".ini", ".mako", ".cfg", ""}
NOT_OURS = {".venv", ".git", "build", "dist", "node_modules", "__pycache__"}


@cache
def python_files() -> tuple[Path, ...]:
    """Every module of the six packages."""
    return tuple(sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")))


@cache
def text_files() -> tuple[Path, ...]:
    """Every text file that belongs to the project, without what tools leave behind."""
    return tuple(sorted(p for p in _walk(ROOT) if p.suffix in TEXT))


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir():
        hidden = path.name.startswith(".") and path.name not in {".ci", ".github", ".gitignore"}
        if path.name in NOT_OURS or path.suffix == ".egg-info" or hidden:
            continue
        found.extend(_walk(path) if path.is_dir() else [path])
    return found


def name_of(path: Path) -> str:
    """The path as people write it."""
    return path.relative_to(ROOT).as_posix()
