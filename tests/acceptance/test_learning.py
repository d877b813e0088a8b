"""Learning is real: on the bundled photographs every part moves clearly away from chance.

Chance is computed, not assumed, on the same held-out photographs:

    generator   the best guess that ignores the picture: accuracy is the share of the commonest token,
                the loss is the entropy of the tokens' distribution, in nats
    REVDET      the best constant probability: the loss is the entropy of the share of replaced positions
    RESPIX      the best constant prediction, found by search, the loss being mean |d| + mean d^2
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from cim_core.cim import CIM, StepOutput, build_cim
from cim_core.config import (
    EnhancerConfig,
    GeneratorConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import ImageDataset, ViewConfig, Views, collate
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.data.sampler import SampleId
from cim_core.durations import plan
from cim_core.engine.callbacks import NoCallbacks
from cim_core.engine.fit import fit
from cim_core.engine.state import TrainState
from cim_core.objectives.respix import Respix
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task
from tests.acceptance.embedded import specs

IMAGE_SIZE, PATCH_SIZE, STRIDE, VOCABULARY = 32, 4, 4, 128
WINDOW = 16  # pixels; docs/lab-log.md has why 8 is too narrow for tokens of this quality
NUM_TEST_IMAGES = 100
SEED = 0
CPU = torch.device("cpu")


def _dataset(uri: object) -> ImageDataset:
    views = ViewConfig(image_size=IMAGE_SIZE, token_size=IMAGE_SIZE, crop_min=0.5, seed=SEED)
    return ImageDataset(scan(str(uri)), views)


def _train(task: object, model: torch.nn.Module, *, steps: int, learning_rate: float) -> None:
    config = TrainingConfig(steps=steps, batch_size=32, learning_rate=learning_rate, precision="fp32")
    dataset = _dataset(specs.TRAIN_TAR)
    fit(
        task,  # type: ignore[arg-type]
        TrainState(model=model, optimizer=build_optimizer(model, config)),
        ImageLoader(dataset, batch_size=config.batch_size, accumulation=1, rank=0, world_size=1),
        plan(config, num_images=len(dataset)),
        config,
        callbacks=NoCallbacks(),
        device=CPU,
    )
    model.eval()


@cache
def _tokenizer() -> DiscreteVAE:
    """A tokenizer that was trained on the photographs for some twenty seconds."""
    config = TokenizerConfig(
        image_size=IMAGE_SIZE, stride=STRIDE, width=16, vocab_size=VOCABULARY, code_dim=16
    )
    model = DiscreteVAE(config, generator=torch.Generator().manual_seed(SEED))
    _train(tokenizer_task(model, seed=SEED), model, steps=200, learning_rate=2e-3)
    return model


@cache
def _held_out() -> Views:
    dataset = _dataset(specs.VAL_TAR)
    places = torch.linspace(0, len(dataset) - 1, NUM_TEST_IMAGES).long().tolist()
    return collate([dataset[SampleId(0, place)] for place in places])


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One model and what it does with photographs that it never saw."""

    model: CIM
    before: StepOutput
    after: StepOutput


@cache
def _pretrained(objective: str) -> Trained:
    assert objective in ("respix", "revdet")
    config = ModelConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        tokenizer=TokenizerSource(source="job:the-tokenizer-above"),
        generator=GeneratorConfig(depth=3),
        enhancer=EnhancerConfig(
            name="vit_tiny_patch16_224",
            shared_blocks=1,
            options={"depth": 4, "embed_dim": 128, "num_heads": 4},
        ),
        objective=ObjectiveConfig(name="respix" if objective == "respix" else "revdet", window=WINDOW),
    )
    model = build_cim(config, _tokenizer(), seed=SEED)
    before = _look(model)
    _train(cim_task(model.train(), seed=SEED), model, steps=200, learning_rate=1e-3)
    return Trained(model=model, before=before, after=_look(model))


@torch.no_grad()
def _look(model: CIM) -> StepOutput:
    model.eval()
    output: StepOutput = model(_held_out(), generator=torch.Generator().manual_seed(SEED))
    return output


def _entropy(probabilities: Tensor) -> float:
    """Nats."""
    return float(torch.special.entr(probabilities).sum())


@pytest.mark.timeout(1200)  # idle it takes a minute
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_generator__predicts_masked_tokens_from_the_picture(objective: str) -> None:
    trained = _pretrained(objective)
    counts = torch.bincount(trained.after.golden_BN.flatten(), minlength=VOCABULARY).double()
    shares = counts / counts.sum()
    # Else the tokens themselves would be trivial: all pictures of one code.
    assert _entropy(shares) > 2

    accuracy, loss = trained.after.metrics["mim_accuracy"].item(), trained.after.metrics["mim_loss"].item()
    assert accuracy > 3 * shares.max().item()
    assert loss < 0.7 * _entropy(shares)
    assert trained.before.metrics["mim_loss"].item() > 0.95 * _entropy(shares)


@pytest.mark.timeout(1200)  # idle it takes a minute
@pytest.mark.slow
def test_revdet__finds_replaced_tokens() -> None:
    trained = _pretrained("revdet")
    positives = trained.after.replaced_BN.double().mean()
    chance = _entropy(torch.stack([positives, 1 - positives]))
    assert trained.after.losses["revdet"].item() < 0.9 * chance
    assert trained.after.metrics["revdet_balanced_accuracy"].item() > 0.6
    assert trained.before.losses["revdet"].item() > 0.98 * chance


@pytest.mark.timeout(1200)  # idle it takes a minute
@pytest.mark.slow
def test_respix__restores_what_no_constant_can() -> None:
    trained = _pretrained("respix")
    objective = trained.model.objective
    assert isinstance(objective, Respix)
    target_B3HW = objective.target(trained.after.clean_B3HW)
    chance = min(_loss(target_B3HW - constant) for constant in torch.linspace(-0.5, 0.5, 101))
    # Where the token was replaced the picture says little about the original: the gain comes from the rest.
    assert trained.after.losses["respix"].item() < 0.985 * chance
    assert trained.after.metrics["respix_error_kept"].item() < 0.95 * target_B3HW.abs().mean().item()
    assert trained.before.losses["respix"].item() > chance


def _loss(difference: Tensor) -> float:
    return (difference.abs().mean() + difference.square().mean()).item()
