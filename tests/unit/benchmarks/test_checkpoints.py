"""What a checkpoint costs: the shares of times made by hand, and all the fields of a tiny case."""

import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoints import BESIDE, BETWEEN, NONE, SNAPSHOT, WRITING, Rounds, measure, summary
from benchmarks.timing import Times
from cim_core.config import TrainingConfig
from cim_core.engine.state import Snapshot, is_complete, load_state
from tests.unit.benchmarks.test_train_step import TINY

TRAINING = TrainingConfig(steps=1000, precision="fp32")


def test_summary__shares_are_of_the_plain_neighbours() -> None:
    seconds = {
        NONE: (10.0, 20.0, 40.0),
        BESIDE: (11.0, 25.0, 40.5),
        BETWEEN: (14.0, 24.0, 48.0),
        SNAPSHOT: (0.1, 0.3, 0.2),
        WRITING: (1.0, 3.0, 2.0),
    }
    times = {name: Times(seconds=values) for name, values in seconds.items()}
    assert summary(times, steps=5) == pytest.approx(
        {
            "step_ms": 4000,
            "snapshot_ms": 200,
            "writing_ms": 2000,
            "writing_share": 2 / 20,
            f"{BESIDE}_extra_ms": 1000,  # of 1, 5 and 0.5 s
            f"{BESIDE}_share": 1 / 20,
            f"{BETWEEN}_extra_ms": 4000,  # of 4, 4 and 8 s
            f"{BETWEEN}_share": 4 / 20,
        }
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def found(scratch: Path) -> dict[str, Any]:
    """Two rounds of two steps, with all temporary files below `scratch`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        return measure(TINY, Namespace(gpu=False, steps=2, rounds=2), TRAINING)


def test_measure__has_all_its_fields(found: dict[str, Any]) -> None:
    kinds = (NONE, BESIDE, BETWEEN, SNAPSHOT, WRITING)
    assert set(found["times"]) == set(kinds)
    assert all(len(found["times"][kind]["rounds_s"]) == 2 for kind in kinds)
    made = summary({kind: Times(seconds=tuple(found["times"][kind]["rounds_s"])) for kind in kinds}, steps=2)
    assert found == {
        **made,
        "batch_size": TINY.batch_size,
        "checkpoint_mib": found["checkpoint_mib"],
        "times": found["times"],
    }
    assert json.loads(json.dumps(found)) == found


def test_measure__leaves_no_files(found: dict[str, Any], scratch: Path) -> None:
    assert found["checkpoint_mib"] > 0
    assert list(scratch.iterdir()) == []


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Rounds(TINY, TRAINING, torch.device("cpu"), steps=3)


@pytest.mark.parametrize("kind", [BESIDE, BETWEEN])
def test_rounds__end_with_the_checkpoint_of_their_beginning_on_the_disk(rounds: Rounds, kind: str) -> None:
    state = rounds.ours.state
    rounds.none()
    weights = [p.detach().clone() for p in state.model.parameters()]
    rounds.by_name()[kind]()
    assert state.step == 6
    load_state(state, rounds.folder / "step", fingerprint={})
    assert state.step == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, state.model.parameters(), strict=True))
    assert rounds.size() > 2 * sum(x.nbytes for x in weights), "weights, and moments of nearly all"


def test_rounds__wait_for_a_slow_disk(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Snapshot.write

    def slowly(snapshot: Snapshot, folder: Path) -> None:
        time.sleep(0.5)
        write(snapshot, folder)

    monkeypatch.setattr(Snapshot, "write", slowly)
    rounds.by_name()[BESIDE]()
    assert is_complete(rounds.folder / "step")
