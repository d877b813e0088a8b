"""What a checkpoint costs a training: none, written beside the steps, and between them, in turns.

    python -m benchmarks.checkpoints                    the cases of benchmarks.train_step for CPUs
    python -m benchmarks.checkpoints --gpu --steps 50   ViT-B/16, ViT-S/16 and ResNet-50 at 224 px

Needs torch and timm alone. A round of each kind is the same number of steps after one checkpoint, and
ends when that is on the disk; so all that the writing takes from the steps beside it is counted.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cases import CPU_CASES, GPU_CASES, Case, cim_of, pictures
from benchmarks.timing import Times, in_turns
from benchmarks.train_step import OurSteps, setup
from cim_core.config import TrainingConfig
from cim_core.engine.background import Background
from cim_core.engine.state import Snapshot, take_snapshot

NONE, BESIDE, BETWEEN = "no checkpoint", "asynchronous", "synchronous"
SNAPSHOT, WRITING = "the snapshot alone", "the snapshot and its writing, without steps"


class Rounds:
    """Steps of one case, after a checkpoint or none."""

    def __init__(self, case: Case, training: TrainingConfig, device: torch.device, *, steps: int) -> None:
        training = replace(training, batch_size=case.batch_size)
        self.ours = OurSteps(cim_of(case, "respix").to(device), pictures(case), training, device)
        self.device, self.steps = device, steps
        self.folder = Path(tempfile.mkdtemp(prefix="cim-bench-"))

    def by_name(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {
            NONE: self.none,
            BESIDE: lambda: self.checkpointed(asynchronous=True),
            BETWEEN: lambda: self.checkpointed(asynchronous=False),
            SNAPSHOT: self.snapshot,
            WRITING: lambda: self.snapshot().write(self.folder / "step"),
        }

    def snapshot(self) -> Snapshot:
        """What a checkpoint takes from the steps before it is written."""
        return take_snapshot(self.ours.state, fingerprint={})

    def none(self) -> None:
        """The steps."""
        for _ in range(self.steps):
            self.ours.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def checkpointed(self, *, asynchronous: bool) -> None:
        """A checkpoint, and the steps."""
        background = Background(enabled=asynchronous)
        snapshot = self.snapshot()
        background.do(lambda: snapshot.write(self.folder / "step"))
        self.none()
        background.wait()
        background.close()

    def size(self) -> int:
        """Bytes of the checkpoint that was written last."""
        return sum(file.stat().st_size for file in (self.folder / "step").rglob("*") if file.is_file())


def summary(times: Mapping[str, Times], *, steps: int) -> dict[str, float]:
    """Medians over the rounds; a share is the extra time of a round, of its own plain neighbour.

    Rounds differ by more than a checkpoint takes: `writing_share` is a bound without their noise, for
    a writing that takes no more from the steps beside it than it takes alone.
    """
    found = {"step_ms": times[NONE].median / steps * 1e3, "snapshot_ms": times[SNAPSHOT].median * 1e3}
    writing = times[WRITING].median
    found |= {"writing_ms": writing * 1e3, "writing_share": writing / times[NONE].median}
    for name in (BESIDE, BETWEEN):
        pairs = zip(times[name].seconds, times[NONE].seconds, strict=True)
        extra = Times(seconds=tuple(a - b for a, b in pairs))
        found |= {f"{name}_extra_ms": extra.median * 1e3, f"{name}_share": extra.median / times[NONE].median}
    return found


def measure(case: Case, given: argparse.Namespace, training: TrainingConfig) -> dict[str, Any]:
    """All of one case."""
    rounds = Rounds(case, training, torch.device("cuda" if given.gpu else "cpu"), steps=given.steps)
    try:
        times = in_turns(rounds.by_name(), rounds=given.rounds, warmup=1)
        return {
            **summary(times, steps=given.steps),
            "batch_size": case.batch_size,
            "checkpoint_mib": rounds.size() / 2**20,
            "times": {name: one.as_json() for name, one in times.items()},
        }
    finally:
        shutil.rmtree(rounds.folder)


def main() -> None:
    """Measure, print, and write a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the cases of 224 px, on cuda")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--steps", type=int, default=50, help="between two checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="a file for the results as JSON")
    given = parser.parse_args()
    training = TrainingConfig(steps=10**6)
    cases = {
        name: case for name, case in (GPU_CASES if given.gpu else CPU_CASES).items() if given.only in name
    }
    facts = setup(torch.device("cuda" if given.gpu else "cpu"), training)
    found: dict[str, Any] = {"setup": facts, "steps": given.steps, "cases": {}}
    for name, case in cases.items():
        found["cases"][name] = measure(case, given, training)
        told = {key: round(value, 4) for key, value in found["cases"][name].items() if key != "times"}
        print(name, json.dumps(told), flush=True)
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
