"""Training from Python alone: the README's example, and a run that is cut and called again."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import cim_core
from cim_core.config import (
    Duration,
    EnhancerConfig,
    GeneratorConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.engine.background import Background
from cim_core.engine.callbacks import StepReport
from cim_core.engine.state import Snapshot, take_snapshot
from cim_core.errors import CheckpointMismatchError
from cim_core.tokenizers.fake import FakeTokenizer
from cim_core.train import pretrain, train_tokenizer

README = Path(cim_core.__file__).parent / "README.md"
TOKENIZER = TokenizerConfig(image_size=16, stride=4, width=4, vocab_size=8, code_dim=4)
MODEL = ModelConfig(
    image_size=32,
    patch_size=8,
    tokenizer=TokenizerSource(source="fake"),
    enhancer=EnhancerConfig(
        name="vit_tiny_patch16_224", options={"depth": 2, "embed_dim": 16, "num_heads": 2}
    ),
    generator=GeneratorConfig(depth=2),
    objective=ObjectiveConfig(name="revdet"),
)
TRAINING = TrainingConfig(steps=5, batch_size=4, precision="fp32", checkpoint_every=Duration(steps=2))


class Cut(Exception):  # noqa: N818
    """The plug is pulled."""


def cut_at(step: int) -> object:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise Cut

    return on_step


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = torch.randint(256, (40, 40, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_readme__its_example_runs_and_plain_timm_loads_the_encoder(photos: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 22
    small = re.sub(r"steps=\d+, batch_size=32", "steps=1, batch_size=4", code)
    small = re.sub(r'images = "[^"]+"', f"images = {str(photos)!r}", small)
    after = (
        'import timm\nloaded = timm.create_model("local-dir:encoder", pretrained=True).state_dict()\n'
        "trained = cim.enhancer.backbone.state_dict()\n"
        "print(len(loaded), all(torch.equal(loaded[k], trained[k]) for k in trained))\n"
    )
    small = "import torch\n" + small
    environment = {"PYTHONPATH": str(README.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", small + after], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert re.fullmatch(r"\d+ True", done.stdout.decode().splitlines()[-1])


def test_pretrain__cut_and_called_again_ends_as_the_uncut_run(photos: Path, tmp_path: Path) -> None:
    whole = pretrain(photos, MODEL, TRAINING, tokenizer=FakeTokenizer())
    given = {"tokenizer": FakeTokenizer(), "checkpoints": tmp_path / "checkpoints"}
    every = replace(TRAINING, log_every=1)
    for step in (3, 5):  # after the checkpoints of 2 and 4
        with pytest.raises(Cut):
            pretrain(photos, MODEL, every, **given, on_step=cut_at(step))  # type: ignore[arg-type]
    seen: list[int] = []
    resumed = pretrain(photos, MODEL, every, **given, on_step=lambda report: seen.append(report.step))  # type: ignore[arg-type]
    assert seen == [5]
    assert_equal(resumed, whole)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-5"]


@pytest.mark.parametrize("quantiser", ["vq", "relaxed"])
def test_tokenizer__cut_and_called_again_ends_as_the_uncut_run(
    photos: Path, tmp_path: Path, quantiser: str
) -> None:
    config = replace(TOKENIZER, quantiser=quantiser)  # type: ignore[arg-type]
    whole = train_tokenizer(photos, config, TRAINING)
    every = replace(TRAINING, log_every=1)
    with pytest.raises(Cut):
        train_tokenizer(photos, config, every, checkpoints=tmp_path / "c", on_step=cut_at(4))  # type: ignore[arg-type]
    resumed = train_tokenizer(photos, config, every, checkpoints=tmp_path / "c")
    assert_equal(resumed, whole)
    assert not any(parameter.requires_grad for parameter in resumed.parameters())


def test_checkpoints__there_is_one_copy_at_a_time(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    real_wait, real_copy = Background.wait, take_snapshot

    def wait(self: Background) -> None:
        story.append("wait")
        real_wait(self)

    def copy(*args: Any, **kwargs: Any) -> Snapshot:
        story.append("copy")
        return real_copy(*args, **kwargs)

    monkeypatch.setattr(Background, "wait", wait)
    monkeypatch.setattr("cim_core.train.take_snapshot", copy)
    train_tokenizer(photos, TOKENIZER, TRAINING, checkpoints=tmp_path / "c")
    before = ["nothing", *story]
    assert story.count("copy") == 3
    assert [one for one, next_one in zip(before, story, strict=False) if next_one == "copy"] == ["wait"] * 3


def test_checkpoints__half_written_ones_are_passed_over(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "c/step-4").mkdir(parents=True)
    (tmp_path / "c/step-4/state.safetensors").write_bytes(b"half")
    whole = train_tokenizer(photos, TOKENIZER, TRAINING)
    assert_equal(train_tokenizer(photos, TOKENIZER, TRAINING, checkpoints=tmp_path / "c"), whole)


def test_checkpoints__a_torn_record_leaves_the_older_one(photos: Path, tmp_path: Path) -> None:
    whole = train_tokenizer(photos, TOKENIZER, TRAINING)
    every, folder = replace(TRAINING, log_every=1), tmp_path / "c"
    with pytest.raises(Cut):
        train_tokenizer(photos, TOKENIZER, every, checkpoints=folder, on_step=cut_at(3))  # type: ignore[arg-type]
    (folder / "step-4").mkdir()
    (folder / "step-4/state.json").write_text('{"format": 1, "st')
    seen: list[int] = []
    again = train_tokenizer(
        photos, TOKENIZER, every, checkpoints=folder, on_step=lambda report: seen.append(report.step)
    )
    assert seen == [3, 4, 5]
    assert_equal(again, whole)


def test_checkpoints__of_another_run_are_refused(photos: Path, tmp_path: Path) -> None:
    train_tokenizer(photos, TOKENIZER, TRAINING, checkpoints=tmp_path / "c")
    other = replace(TRAINING, learning_rate=1e-3)
    with pytest.raises(CheckpointMismatchError, match="learning_rate"):
        train_tokenizer(photos, TOKENIZER, other, checkpoints=tmp_path / "c")
