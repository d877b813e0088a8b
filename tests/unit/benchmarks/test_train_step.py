"""The step beside a plain composition: they compute the same, and the figures are what they are called."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.plain_step import PlainStep
from benchmarks.step_cases import PEERS, Case, cim_of, pictures
from benchmarks.timing import Times
from benchmarks.train_step import (
    OURS,
    PARTS,
    PLAIN,
    Measured,
    OurSteps,
    as_json,
    check_same_losses,
    measure,
    peak_bytes,
    save,
    setup,
    table,
)
from cim_core.cim import CIM
from cim_core.config import EnhancerConfig, GeneratorConfig, TrainingConfig
from cim_core.data.dataset import Views
from cim_core.engine.transfer import on_device
from cim_core.tokenizers.dalle import DalleConfig

CPU = torch.device("cpu")
TINY = Case(
    enhancer=EnhancerConfig(
        name="vit_tiny_patch16_224", options={"depth": 1, "embed_dim": 32, "num_heads": 2}
    ),
    generator=GeneratorConfig(depth=1, width=32, heads=2),
    batch_size=2,
    image_size=32,
    patch_size=8,
    tokenizer=DalleConfig(width=2, vocab_size=16, code_dim=4, blocks_per_group=1),
)
TINY_RESNET = Case(
    enhancer=EnhancerConfig(name="test_resnet"),
    generator=TINY.generator,
    batch_size=2,
    image_size=32,
    patch_size=8,
    tokenizer=TINY.tokenizer,
)
TRAINING = TrainingConfig(steps=8, batch_size=64, precision="fp32")


def model_of(case: Case) -> CIM:
    cim = cim_of(case, "respix")
    assert isinstance(cim, CIM)
    return cim.train()


@pytest.mark.parametrize("case", [TINY, TINY_RESNET], ids=["ViT", "ResNet"])
def test_check_same_losses__ours_and_the_plain_ones_are_the_same(case: Case) -> None:
    check_same_losses(model_of(case), pictures(case), CPU)


class Faulty(PlainStep):
    """A plain composition whose head has another weight, as a wrong one might."""

    def losses(self, views: Views, **given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            weights = [p for p in self.cim.objective.parameters() if p.ndim > 1]
            weights[0].mul_(1.1)
        return super().losses(views, **given)


def test_check_same_losses__finds_a_head_of_another_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "PlainStep", Faulty)
    with pytest.raises(AssertionError, match="not close"):
        check_same_losses(model_of(TINY), pictures(TINY), CPU)


@pytest.fixture(scope="module")
def small_matrices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "MATRIX_SIDE", {"cpu": 32})
        yield


def measured(case: Case) -> Measured:
    return measure(case, "respix", training=TRAINING, device=CPU, steps=2, rounds=2, warmup=0)


@pytest.fixture(scope="module")
def of_a_vit(small_matrices: None) -> Measured:
    return measured(TINY)


def test_measure__has_every_step_and_part(of_a_vit: Measured) -> None:
    steps = {OURS, PLAIN, *PEERS}
    assert set(of_a_vit.times) == set(of_a_vit.macs_per_image) == steps | set(PARTS)
    assert set(of_a_vit.peak_bytes) == steps
    assert all(len(times.seconds) == 2 and times.low > 0 for times in of_a_vit.times.values())
    assert all(of_a_vit.peak_bytes[name] > 0 for name in steps)
    assert of_a_vit.batch_size == TINY.batch_size, "not the training's"
    assert of_a_vit.peak_flops > 0


def test_measure__counts_the_products_of_the_whole_step_in_its_parts(of_a_vit: Measured) -> None:
    macs = of_a_vit.macs_per_image
    assert macs["optimizer"] == 0
    # The masks of two steps are not of one size, and so not the generator's head.
    assert sum(macs[name] for name in PARTS) == pytest.approx(macs[OURS], rel=0.01)
    assert all(macs[name] > 0.02 * macs[OURS] for name in PARTS if name != "optimizer")
    assert macs[PLAIN] > macs[OURS], "it judges every position and decodes by a product with one-hot maps"


def test_measure__has_no_peers_for_a_resnet(small_matrices: None) -> None:
    found = measured(TINY_RESNET)
    assert set(found.times) == {OURS, PLAIN, *PARTS}
    assert set(found.summary()) == {
        "images/s",
        "images/s, plain",
        f"{PLAIN} / {OURS}",
        "share of the measured matrix peak",
    }


def test_summary__of_times_made_by_hand() -> None:
    seconds = {OURS: (1.0, 2.0, 4.0), PLAIN: (3.0, 2.0, 16.0), "BEiT": (0.5, 0.5, 0.5), PARTS[0]: (9.0,)}
    summary = Measured(
        times={name: Times(seconds=values) for name, values in seconds.items()},
        macs_per_image={OURS: 50.0},
        peak_bytes={},
        peak_flops=1000.0,
        batch_size=8,
    ).summary()
    assert summary == {
        "images/s": 8 / 2.0,
        "images/s, plain": 8 / 3.0,
        f"{PLAIN} / {OURS}": 3.0,  # of 3, 1 and 4
        f"BEiT / {OURS}": 0.25,  # of 1/2, 1/4 and 1/8
        "share of the measured matrix peak": 2 * 50.0 * 8 / 2.0 / 1000.0,
    }


def test_results__go_into_a_file_and_a_table(of_a_vit: Measured) -> None:
    record = json.loads(json.dumps(as_json(of_a_vit)))
    assert record["summary"] == of_a_vit.summary()
    assert record["batch_size"] == TINY.batch_size
    assert {f"{name} / {OURS}" for name in (PLAIN, *PEERS)} < set(record["summary"])
    lines = table("tiny", of_a_vit).splitlines()
    for name in (OURS, PLAIN, *PEERS, *PARTS):
        assert sum(line.startswith(f"{name}  ") for line in lines) == 1


def test_setup__leaves_the_batch_to_the_cases() -> None:
    facts = setup(CPU, TRAINING)["training"]
    assert "batch_size" not in facts
    assert (facts["steps"], facts["precision"]) == (8, "fp32")


def test_steps__take_their_batches_as_a_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Views] = []

    def watched(batches: Iterable[Views], device: torch.device) -> Iterator[Views]:
        for batch in on_device(batches, device):
            moved.append(batch)
            yield batch

    monkeypatch.setattr(train_step, "on_device", watched)
    cim = model_of(TINY)
    before = [p.detach().clone() for p in cim.parameters()]
    ours = OurSteps(cim, pictures(TINY), TRAINING, CPU)
    ours.step()
    ours.step()
    assert [batch is ours.views for batch in moved] == [True, True], "a CPU takes them as they are"
    assert ours.state.step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, cim.parameters(), strict=True))


def test_peak_bytes__has_the_gradients_once_and_nothing_that_was_there_before() -> None:
    num_layers, side = 8, 64
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(num_layers)))
    optimizer, inputs = torch.optim.AdamW(model.parameters()), torch.ones(1, side)

    def step_without_freeing() -> None:
        model(inputs).sum().backward()
        optimizer.step()

    step_without_freeing()
    one = 4 * side**2
    held = peak_bytes(step_without_freeing, optimizer, CPU)
    assert num_layers * one <= held <= (num_layers + 3) * one, "the update works on one layer at a time"


def test_peak_bytes__of_a_step_has_its_gradients() -> None:
    cim = model_of(TINY)
    ours = OurSteps(cim, pictures(TINY), TRAINING, CPU)
    ours.step()
    gradients = sum(p.numel() * 4 for p in cim.parameters() if p.grad is not None)
    assert peak_bytes(ours.step, ours.state.optimizer, CPU) > gradients > 0


def test_save__never_writes_over_an_earlier_file(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    paths = [save({"run": run}, folder, name="train_step-2026-11-29-cpu") for run in range(3)]
    assert [path.name for path in paths] == [
        f"train_step-2026-11-29-cpu{end}.json" for end in ("", "-2", "-3")
    ]
    assert [json.loads(path.read_text())["run"] for path in paths] == [0, 1, 2]
