"""What may be loaded by whom, seen from a fresh process. Arrows between packages: `lint-imports`."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, name_of, python_files

HEAVY = ("torch", "torchvision", "timm", "ray", "mlflow", "sqlalchemy", "numpy", "boto3", "pandas")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = (
        f"import json, sys; {statement}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(out.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import service",
        "import service.cli.main",
        "import service.client",
        "import service.contracts.specs, service.contracts.jobs, service.contracts.work",
        "import cim_core.config, cim_core.errors",
    ],
)
def test_imports__light_modules_load_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & set(HEAVY)


def test_imports__core_config_is_standard_library_only() -> None:
    ours = loaded_by("import cim_core.config") - loaded_by("pass")
    assert not {m for m in ours if m not in sys.stdlib_module_names} - {"cim_core"}


def test_imports__api_and_dispatcher_load_no_torch_and_no_ray() -> None:
    loaded = loaded_by("import service.api.app, service.dispatch.loop, service.embedded")
    assert not loaded & {"torch", "torchvision", "timm", "ray", "workers"}


def test_loaded_by__sees_what_a_module_pulls_in() -> None:
    assert "numpy" in loaded_by("import numpy")


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file names in an import, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_that_import(module: str, *, under: str) -> list[str]:
    found = [p for p in python_files() if name_of(p).startswith(under)]
    return [name_of(p) for p in found if any(f"{m}.".startswith(f"{module}.") for m in imports(p))]


def test_imports__distributed_torch_has_one_door() -> None:
    assert files_that_import("torch.distributed", under="cim_core/") == ["cim_core/engine/dist.py"]


@pytest.mark.parametrize("module", ["pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"])
@pytest.mark.parametrize("package", ["cim_core/", "service/", "workers/"])
def test_imports__nothing_is_unpickled(module: str, package: str) -> None:
    assert not files_that_import(module, under=package)


def calls(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_imports__torch_load_is_never_called() -> None:
    product = [p for p in python_files() if not name_of(p).startswith("tests/")]
    assert not [name_of(p) for p in product if {"torch.load", "torch.save"} & set(calls(p))]


@pytest.mark.parametrize("package", ["cim_core/", "service/", "workers/"])
def test_imports__products_know_no_tests(package: str) -> None:
    assert not files_that_import("tests", under=package)
