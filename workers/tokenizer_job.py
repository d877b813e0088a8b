"""`kind: tokenizer`: train a discrete image tokenizer and leave it as the folder `tokenizer/`."""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.evaluation.features import evaluating
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.evaluate import collapse, evaluate_tokenizer, reconstruction_grid
from cim_core.tokenizers.store import save_tokenizer
from cim_core.tokenizers.task import tokenizer_task
from service.contracts.specs import TokenizerSpec
from workers.attempt import Outcome
from workers.data import held_out, index_of
from workers.rank import Rank
from workers.training import Training, conclude, fixed_views, train

log = logging.getLogger(__name__)

BATCH = 32  # images at a time where nothing is trained


def run_tokenizer(rank: Rank) -> Outcome:
    """Train, then measure on images that were held out. Raises what `train` raises."""
    spec = rank.attempt.spec
    assert isinstance(spec, TokenizerSpec), f"not a tokenizer job: {spec.kind}"
    seed = spec.training.seed
    kept, out = held_out(index_of(rank, "data"), seed=seed)
    views = ViewConfig(image_size=spec.model.image_size, crop_min=spec.training.crop_min, seed=seed)
    dataset, unseen = ImageDataset(kept, views), ImageDataset(out, views)
    model = DiscreteVAE(spec.model, generator=generator_for(seed, "init", "tokenizer")).to(rank.device)
    outcome = train(
        rank,
        Training(
            model=model,
            task=lambda module: tokenizer_task(module, seed=seed),
            dataset=dataset,
            picture=lambda: _picture(model, unseen, seed=seed, device=rank.device),
        ),
    )
    if outcome.stopped or not rank.leads:
        return outcome
    return _finish(rank, model, unseen, outcome)


def _finish(rank: Rank, model: DiscreteVAE, unseen: ImageDataset, outcome: Outcome) -> Outcome:
    rank.say("measuring on held-out images")
    model.eval()
    values = dict(evaluate_tokenizer(model, _pixels(unseen, device=rank.device)))
    metrics = {f"val_{name}": value for name, value in values.items()}
    rank.reporter.metrics(outcome.step, metrics)
    with tempfile.TemporaryDirectory(prefix="cim-tokenizer-") as folder:
        save_tokenizer(model, Path(folder))
        for entry in rank.store.put_folder("tokenizer", Path(folder)):
            rank.announce(entry)
    collapsed = collapse(values, model.config)
    if collapsed:
        log.warning("%s", collapsed)
    outcome = dataclasses.replace(
        outcome,
        metrics={**outcome.metrics, **metrics},
        warnings=[collapsed] if collapsed else [],
        files=rank.files,
    )
    return conclude(rank, outcome)


def _picture(model: DiscreteVAE, unseen: ImageDataset, *, seed: int, device: torch.device) -> Image.Image:
    """Held-out images beside their reconstructions; the model's mode is kept."""
    views = fixed_views(unseen, seed=seed, device=device)
    with evaluating(model):
        return reconstruction_grid(model, views.pixels_B3HW.float() / 255)


def _pixels(dataset: ImageDataset, *, device: torch.device) -> Iterator[Tensor]:
    for first in range(0, len(dataset), BATCH):
        places = range(first, min(first + BATCH, len(dataset)))
        yield torch.stack([dataset.eval_image(place) for place in places]).to(device).float() / 255
