"""`make test`: the tiers in order, each in a pytest of its own; further arguments go to each.

Exit status: 0 if every tier passed, 1 otherwise. A failing tier does not keep the next from running.
The last line counts the tests of all tiers together: `total: N passed, N failed, N skipped`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

FOREIGN = ("CIM_", "RAY_", "MLFLOW_")  # settings of a service in use must not reach the tests
NO_TESTS = 5  # pytest's exit status for an empty selection


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Tests that are run in the same way."""

    name: str
    folders: tuple[str, ...]
    options: tuple[str, ...] = ()
    one_thread: bool = False  # for torch: where several tests share the cores


TIERS = (
    Tier(
        name="unit",
        folders=("tests/unit", "tests/golden", "tests/architecture"),
        options=("-n", "2"),
        one_thread=True,
    ),
    # All three start servers: one test at a time.
    Tier(name="integration", folders=("tests/integration",)),
    Tier(name="acceptance", folders=("tests/acceptance",)),
    Tier(name="chaos", folders=("tests/chaos",), one_thread=True),
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many tests ended in which way."""

    passed: int = 0
    failed: int = 0  # errors in fixtures included
    skipped: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            passed=self.passed + other.passed,
            failed=self.failed + other.failed,
            skipped=self.skipped + other.skipped,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a tier ended."""

    tier: str
    word: str
    seconds: float = 0.0
    counts: Counts = Counts()
    ok: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every tier; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verdicts = [run(tier, given) for tier in TIERS]
    verdicts.append(run_gpu(given))
    print("\n" + "\n".join(f"{v.tier:<12} {v.word:<10} {v.seconds:6.0f} s" for v in verdicts))
    total = sum((v.counts for v in verdicts), Counts())
    print(f"\ntotal: {total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def run(tier: Tier, arguments: Sequence[str]) -> Verdict:
    """One pytest; an empty selection is a failure unless the caller asked for a part."""
    print(f"\n=== {tier.name} ===", flush=True)
    selection = [*tier.folders, "-m", "not gpu", *tier.options, *arguments]
    return _judged(tier.name, selection, environment(tier), may_be_empty=bool(arguments))


def run_gpu(arguments: Sequence[str]) -> Verdict:
    """The tests that need an NVIDIA GPU, or the reason why they are left out."""
    print("\n=== gpu ===", flush=True)
    probe = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if subprocess.run(probe, check=False).returncode != 0:
        print("left out: torch finds no NVIDIA GPU on this machine")
        return Verdict(tier="gpu", word="left out")
    return _judged("gpu", ["tests", "-m", "gpu", *arguments], dict(os.environ), may_be_empty=True)


def _judged(name: str, selection: list[str], env: dict[str, str], *, may_be_empty: bool) -> Verdict:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cim-tests-") as folder:
        written = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *selection, f"--junitxml={written}"]
        status = subprocess.run(command, env=env, check=False).returncode
        counts = counted(written)
    ok = status == 0 and not counts.failed  # a pytest that ends with 0 without a report was cut short
    seconds = time.monotonic() - started
    if status == NO_TESTS and may_be_empty:
        return Verdict(tier=name, word="nothing", seconds=seconds)
    word = "passed" if ok else f"FAILED ({status})"
    return Verdict(tier=name, word=word, seconds=seconds, counts=counts, ok=ok)


def counted(written: Path) -> Counts:
    """The counts of a JUnit file; one failure where there is none, since pytest was then cut short."""
    if not written.exists():
        return Counts(failed=1)
    suites = ElementTree.parse(written).getroot().iter("testsuite")  # noqa: S314 - our own pytest's
    return sum((_of_suite(suite) for suite in suites), Counts())


def _of_suite(suite: ElementTree.Element) -> Counts:
    tests, failures, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counts(passed=tests - failures - errors - skipped, failed=failures + errors, skipped=skipped)


def environment(tier: Tier) -> dict[str, str]:
    """The caller's environment without what would change the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | ({"OMP_NUM_THREADS": "1"} if tier.one_thread else {})


if __name__ == "__main__":
    sys.exit(main())
