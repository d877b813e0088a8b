"""`kind: pretrain`: Corrupted Image Modeling or a peer of it; leaves the encoder as the folder `encoder/`."""

import dataclasses
import logging
import tempfile
from collections.abc import Container
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from torch import nn

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.diagnostics import NUM_IMAGES, diagnose
from cim_core.durations import Every, Plan, steps_of
from cim_core.export import encoder_weights, export_encoder
from cim_core.methods import build_model
from cim_core.pretraining import Pretraining
from cim_core.samples import sample_grid
from cim_core.seeding import generator_for, seed_for
from cim_core.task import cim_task
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dalle import DalleTokenizer
from cim_core.tokenizers.fake import FakeTokenizer
from cim_core.tokenizers.store import load_tokenizer
from service.contracts.specs import PretrainSpec
from workers.attempt import Outcome
from workers.data import index_of
from workers.neighbours import Labelled, measure
from workers.rank import Rank
from workers.results import code_version
from workers.training import Training, conclude, fixed_views, plan_of, train

log = logging.getLogger(__name__)

FAKE = "fake"
PROBE_BATCH = 64
PROBE_K, PROBE_TEMPERATURE = 20, 0.07  # as the evaluation's defaults


def run_pretrain(rank: Rank) -> Outcome:
    """Pre-train and export. Raises what `train` raises, and ModelError for an unusable tokenizer."""
    spec = spec_of(rank)
    seed = spec.training.seed
    model = build_model(spec.model, tokenizer_of(rank), seed=seed_for(seed, "init", "cim")).to(rank.device)
    views = ViewConfig(
        image_size=spec.model.image_size,
        token_size=model.token_size,
        crop_min=spec.training.crop_min,
        seed=seed,
    )
    dataset = ImageDataset(index_of(rank, "data"), views)
    outcome = train(
        rank,
        Training(
            model=model,
            task=lambda module: cim_task(module, seed=seed),
            dataset=dataset,
            picture=lambda: _picture(model, dataset, seed=seed),
            probe=lambda: _probe(rank, model),
            probe_steps=probe_steps(spec, plan_of(rank)),
            diagnose=lambda: _diagnose(model, dataset, seed=seed),
        ),
    )
    if outcome.stopped or not rank.leads:
        return outcome
    return _finish(rank, model, outcome)


def spec_of(rank: Rank) -> PretrainSpec:
    """The spec, which is a pre-training's."""
    spec = rank.attempt.spec
    assert isinstance(spec, PretrainSpec), f"not a pretrain job: {spec.kind}"
    return spec


def tokenizer_of(rank: Rank) -> Tokenizer | None:
    """The frozen tokenizer that the spec names, if any. Raises ModelError where it cannot be used."""
    named = spec_of(rank).model.tokenizer
    if named is None:
        return None
    if named.source == FAKE:
        log.warning("the tokenizer is FAKE, an untrained stand-in for tests: the encoder will be worthless")
        return FakeTokenizer()
    rank.say("fetching the tokenizer")
    cache = rank.attempt.downloads
    given = rank.attempt.assignment.inputs.get("tokenizer", named.source)
    return load_tokenizer(cache.artifact(rank.work.tokenizer or given))


def _picture(model: Pretraining, dataset: ImageDataset, *, seed: int) -> Image.Image:
    views = fixed_views(dataset, seed=seed, device=next(model.parameters()).device)
    return sample_grid(model, views, generator=generator_for(seed, "pictures", "masks"))


def _diagnose(model: Pretraining, dataset: ImageDataset, *, seed: int) -> dict[str, float]:
    device = next(model.parameters()).device
    views = fixed_views(dataset, seed=seed, device=device, count=NUM_IMAGES)
    return diagnose(model, views, generator=generator_for(seed, "diagnostics", "masks"))


def probe_steps(spec: PretrainSpec, plan: Plan) -> Container[int]:
    """After each `probe.every`, in whole steps, and at the end."""
    if spec.probe is None:
        return ()
    every = steps_of(spec.probe.every, batch_size=plan.batch_size, num_images=plan.num_images)
    return Every(period=Fraction(every), total_steps=plan.total_steps)


def _probe(rank: Rank, model: Pretraining) -> dict[str, float]:
    """Weighted k-NN accuracy of the encoder as it would be exported now; on all ranks."""
    labelled = Labelled.of(rank, train="probe_train", val="probe_val", image_size=model.config.image_size)
    k = min(PROBE_K, len(labelled.train))
    features = labelled.features(rank, encoder_of(model), batch_size=PROBE_BATCH)
    return {"probe_knn_top1": measure(features, k=k, temperature=PROBE_TEMPERATURE)}


def encoder_of(model: Pretraining) -> nn.Module:
    """What a user of the export gets: weights (averaged where asked for) and pooling of timm's own model."""
    plan = model.enhancer.plan
    encoder: nn.Module = timm.create_model(plan.name, **plan.export_args)
    encoder.load_state_dict(encoder_weights(model))
    return encoder


def _finish(rank: Rank, model: Pretraining, outcome: Outcome) -> Outcome:
    rank.say("exporting the encoder")
    with tempfile.TemporaryDirectory(prefix="cim-encoder-") as folder:
        export_encoder(model, Path(folder), card=card_of(rank, model.frozen, outcome))
        for entry in rank.store.put_folder("encoder", Path(folder)):
            rank.announce(entry)
    return conclude(rank, dataclasses.replace(outcome, files=rank.files))


def card_of(rank: Rank, tokenizer: Tokenizer | None, outcome: Outcome) -> dict[str, Any]:
    """Facts of the model card that the model itself does not know."""
    spec = spec_of(rank)
    index = index_of(rank, "data")
    code = code_version()
    origin = tokenizer.origin if isinstance(tokenizer, DalleTokenizer) else {}
    return {
        **{f"tokenizer_{name}": digest for name, digest in origin.items()},
        "dataset": spec.data.uri,
        "images_used": len(index),
        "images_skipped": len(index.skipped),
        "steps": outcome.step,
        "epochs": round(plan_of(rank).epoch_of(outcome.step), 2),
        "job": f"{rank.attempt.assignment.job_id} ({spec.name})",
        "code_version": f"{code['version']}, sources {code['source_sha256'][:12]}",
    }
