"""`make test`: the tiers in order, each in a pytest of its own; further arguments go to each.

Exit status: 0 if every tier passed, 1 otherwise. A failing tier does not keep the next from running.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

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
class Verdict:
    """How a tier ended."""

    tier: str
    word: str
    seconds: float = 0.0
    ok: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every tier; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verdicts = [run(tier, given) for tier in TIERS]
    verdicts.append(run_gpu(given))
    print("\n" + "\n".join(f"{v.tier:<12} {v.word:<10} {v.seconds:6.0f} s" for v in verdicts))
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def run(tier: Tier, arguments: Sequence[str]) -> Verdict:
    """One pytest; an empty selection is a failure unless the caller asked for a part."""
    print(f"\n=== {tier.name} ===", flush=True)
    command = [sys.executable, "-m", "pytest", *tier.folders, "-m", "not gpu", *tier.options, *arguments]
    started = time.monotonic()
    status = subprocess.run(command, env=environment(tier), check=False).returncode
    seconds = time.monotonic() - started
    if status == NO_TESTS and arguments:
        return Verdict(tier=tier.name, word="nothing", seconds=seconds)
    word = "passed" if status == 0 else f"FAILED ({status})"
    return Verdict(tier=tier.name, word=word, seconds=seconds, ok=status == 0)


def run_gpu(arguments: Sequence[str]) -> Verdict:
    """The tests that need an NVIDIA GPU, or the reason why they are left out."""
    print("\n=== gpu ===", flush=True)
    probe = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if subprocess.run(probe, check=False).returncode != 0:
        print("skipped: torch finds no NVIDIA GPU on this machine")
        return Verdict(tier="gpu", word="skipped")
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", *arguments]
    started = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    seconds = time.monotonic() - started
    if status == NO_TESTS:
        print("no test carries the marker gpu yet")
    ok = status in (0, NO_TESTS)
    return Verdict(tier="gpu", word="passed" if ok else f"FAILED ({status})", seconds=seconds, ok=ok)


def environment(tier: Tier) -> dict[str, str]:
    """The caller's environment without what would change the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | ({"OMP_NUM_THREADS": "1"} if tier.one_thread else {})


if __name__ == "__main__":
    sys.exit(main())
