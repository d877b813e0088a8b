"""Changes one operator, number or condition of the core at a time and asks whether its tests notice.

    python -m scripts.mutants            every target below
    python -m scripts.mutants masking    one of them

Needs the dependency group `mutants` (Cosmic Ray finds and makes the changes). A child process is forked
for each mutant, with torch and timm loaded already. Prints each survivor as it is found; exit status 1 if one
survived that is not listed in tests/mutants.json with the reason why it changes no behaviour.
"""

import argparse
import contextlib
import difflib
import gc
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from rich.console import Console
from rich.progress import track

TESTS = "tests/unit/cim_core"
# Module to the test files that must notice; without the minutes-long ones.
TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cim_core.masking": ("test_masking.py",),
        "cim_core.data.sampler": ("test_sampler.py",),
        "cim_core.cim": ("test_sampling.py", "test_cim.py", "test_planted_faults.py"),
        "cim_core.pretraining": ("test_pretraining.py", "test_cim.py", "test_planted_faults.py"),
        "cim_core.objectives.respix": ("test_respix.py",),
        "cim_core.objectives.revdet": ("test_revdet.py",),
        "cim_core.tokenizers.network": ("test_tokenizer_network.py",),
        "cim_core.tokenizers.portions": ("test_portions.py",),
        "cim_core.tokenizers.dvae": ("test_tokenizer_dvae.py", "test_planted_faults.py"),
    }
)
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Mul_Add", "Div_Mul", "Div_FloorDiv", "FloorDiv_Div", "FloorDiv_Mul",
        "Mod_Mul", "Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd", "BitAnd_BitXor",
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_Gt", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_Lt", "GtE_Gt", "GtE_Lt",
        "Is_IsNot", "IsNot_Is",
    )),
    *(f"ReplaceUnaryOperator_{pair}" for pair in ("Delete_USub", "Delete_Invert", "Delete_Not")),
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "NumberReplacer", "RemoveDecorator", "ZeroIterationForLoop",
)  # fmt: skip
# A `*` between parameters is no product.
_SIGNATURE = re.compile(r"^\+.*, [/+], \w+: ", re.MULTILINE)
KNOWN = Path("tests/mutants.json")
TIMEOUT_S = 240.0  # for the tests of the module as it is; a mutant's may take ten times what they took
# Tests of the core need no plugin and none of the fixtures of the service, which take seconds to load.
PYTEST = ("-q", "-x", "--noconftest", "--disable-plugin-autoload", "-o", "addopts=", "-p", "no:cacheprovider",
          "-m", "not gpu")  # fmt: skip
PRELOADED = (
    "torch",
    "timm",
    "torchvision",
    "numpy",
    "safetensors.torch",
    "sklearn.neighbors",
    "skimage.metrics",
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One changed module."""

    module: str
    operator: str
    source: str
    diff: str  # the changed lines alone


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Gives the changed source for one module name."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, *_: object) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self._mutant.module else None

    def get_source(self, _fullname: str) -> str:
        return self._mutant.source

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._mutant.source, _file(module.__name__), "exec"), module.__dict__)  # noqa: S102


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every mutant of the named targets; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", help="last part of a module's name; all if none is given")
    wanted = parser.parse_args(arguments).target
    targets = [name for name in TARGETS if not wanted or name.rpartition(".")[2] in wanted]
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or each child collects, and so copies, all that was loaded
    excused = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}
    survivors = [mutant for name in targets for mutant in survivors_of(name)]
    unexcused = [mutant for mutant in survivors if mutant.diff not in excused.get(mutant.module, {})]
    print(f"{len(survivors)} survived, {len(unexcused)} of them without an excuse")
    return 1 if unexcused else 0


def survivors_of(name: str) -> Iterator[Mutant]:
    """Mutants of module `name` that its tests let pass."""
    mutants = list(mutants_of(name))
    started, told = time.monotonic(), {"passed": 0, "failed": 0, "hung": 0}
    assert verdict(None, TARGETS[name], TIMEOUT_S) == "passed", (
        f"the tests of {name} must pass before anything is changed"
    )
    timeout_s = 20 + 10 * (time.monotonic() - started)
    for mutant in track(mutants, description=name, console=Console(stderr=True)):
        word = verdict(mutant, TARGETS[name], timeout_s)
        told[word] += 1
        if word == "passed":
            print(f"\n{name} {mutant.operator} survived\n{mutant.diff}", flush=True)
            yield mutant
    print(f"{name}: {len(mutants)} mutants, {told}, {time.monotonic() - started:.0f} s", flush=True)


def mutants_of(name: str) -> Iterator[Mutant]:
    """Every change that the operators make, each source once."""
    original = Path(_file(name)).read_text(encoding="utf-8")
    seen = {original}
    for operator in OPERATORS:
        for occurrence in count():
            source = mutate_code(original, get_operator(f"core/{operator}")(), occurrence)
            if source is None:
                break
            changed = _changed(original, source)
            if source not in seen and not _SIGNATURE.search(changed):
                yield Mutant(module=name, operator=operator, source=source, diff=changed)
            seen.add(source)


def verdict(mutant: Mutant | None, tests: Sequence[str], timeout_s: float) -> str:
    """Whether the tests passed, failed or hung on the mutant, in a process of its own."""
    child = multiprocessing.get_context("fork").Process(target=_judge, args=(mutant, tests))
    child.start()
    child.join(timeout_s)
    if child.is_alive():
        child.kill()
        child.join()
        return "hung"
    return "passed" if child.exitcode == 0 else "failed"


def _judge(mutant: Mutant | None, tests: Sequence[str]) -> None:
    if mutant is not None:
        sys.meta_path.insert(0, _Mutated(mutant))
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = pytest.main([*PYTEST, *(f"{TESTS}/{name}" for name in tests)])
    os._exit(int(status))


def _file(name: str) -> str:
    return name.replace(".", "/") + ".py"


def _changed(original: str, source: str) -> str:
    lines = difflib.unified_diff(original.splitlines(), source.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


if __name__ == "__main__":
    sys.exit(main())
