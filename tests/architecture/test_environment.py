"""Only the entry points read the environment; everything else is handed its settings."""

import ast
from pathlib import Path

import pytest

from tests.architecture.tree import name_of, python_files

# Each one starts a process or is the settings object itself.
MAY_READ = {
    "service/settings.py": "the service's settings object",
    "service/__main__.py": "hands the environment on to the processes that `up` starts",
    "service/cli/main.py": "finds the service: CIM_URL",
    "service/cli/database.py": "finds the database: CIM_DATABASE_URL",
    "workers/__main__.py": "takes the code that claims the attempt",
    "workers/settings.py": "the worker's settings object",
}
PRODUCT = ("cim_core/", "service/", "workers/")


def reads_environment(source: str) -> bool:
    """Whether code names os.environ, os.getenv or os.putenv, however it was imported."""
    names = {"environ", "getenv", "putenv", "environb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}:
            return True
    return False


@pytest.mark.parametrize("path", [p for p in python_files() if name_of(p).startswith(PRODUCT)], ids=name_of)
def test_environment__is_read_by_entry_points_only(path: Path) -> None:
    if name_of(path) not in MAY_READ:
        assert not reads_environment(path.read_text()), "take it as an argument, from the settings object"


@pytest.mark.parametrize(
    "source", ["import os\nos.getenv('A')", "from os import environ", "import os\nos.environ['A']"]
)
def test_reads_environment__sees_each_way(source: str) -> None:
    assert reads_environment(source)
    assert not reads_environment("import os\nos.path.join('a', 'b')")
