"""The setting of a call: images, probes, and a tokenizer that is trained where there is none yet."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.labelled import Labelled, SameImages, decoded, thinned
from benchmarks.learning.budget import CLOCKS, num_steps, step_seconds, train
from benchmarks.learning.finetuning import Length
from benchmarks.learning.probing import Probes
from benchmarks.learning.runs import Setting
from cim_core.config import TokenizerConfig, TokenizerTrainingConfig, TrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import Index, scan
from cim_core.engine.precision import with_precision
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.evaluate import RATE_TIMES_WIDTH, evaluate_tokenizer
from cim_core.tokenizers.store import load_tokenizer, save_tokenizer
from cim_core.tokenizers.task import tokenizer_task

FACTS = "benchmark.json"  # beside a tokenizer's own files: what its training took
CURVE_IMAGES = 1000  # labelled images of each set that a look during training takes
TOKENIZER_BATCH = 32
CACHE_BYTES = 2**31  # of decoded pictures: a small set is decoded once for all runs
MEASURED = 256  # validation images for the tokenizer's PSNR


def setting_of(given: argparse.Namespace) -> Setting:
    """Read the images, and train the tokenizer if its folder is not there."""
    train_index, val_index = scan(given.train), scan(given.val)
    images = _pictures(train_index)
    folder = given.tokenizer or given.out.with_name(f"{given.out.stem}-tokenizer")
    if not folder.exists():
        make_tokenizer(folder, given, images, val_index)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, DiscreteVAE), "the benchmark's tokenizer is one that this project trains"
    facts = _facts(folder, given)
    both = (train_index, val_index)
    return Setting(
        images=images,
        probes=Probes(
            full=_labelled(both, given.labelled),
            few=_labelled(both, min(given.labelled, CURVE_IMAGES)),
            device=given.device,
        ),
        tokenizer=tokenizer.to(given.device),
        tokenizer_seconds=facts["seconds"],
        tokenizer_facts=facts,
        image_size=given.size,
        patch_size=given.patch,
        training=with_precision(
            TrainingConfig(
                steps=1,  # of each run: its seconds divided by those of a step
                batch_size=given.batch,
                crop_min=given.crop_min,
            ),
            given.device,
        ),
        rate=given.rate,
        seconds=given.seconds,
        points=given.points,
        finetune_length=Length(given.finetune_seconds, given.finetune_steps),
        finetune_rate=given.finetune_rate,
        finetune_images=_pictures(thinned(train_index, given.finetune_images)),
        clock=given.clock,
        more_probes=given.more_probes,
        label=given.label,
        changes=dict(change(text) for text in given.set),
    )


def change(text: str) -> tuple[str, Any]:
    """`path=value` with a value in JSON, or else as text."""
    path, _, value = text.partition("=")
    try:
        return path, json.loads(value)
    except ValueError:
        return path, value


def make_tokenizer(folder: Path, given: argparse.Namespace, images: ImageDataset, unseen: Index) -> None:
    """Train a tokenizer for its seconds and leave it, with what that took, in `folder`."""
    stride = given.stride or given.patch // 2
    side = given.size // given.patch * stride
    config = TokenizerConfig(
        image_size=side, stride=stride, width=given.tokenizer_width, vocab_size=given.vocabulary
    )
    training = with_precision(
        TokenizerTrainingConfig(
            steps=1,
            batch_size=min(TOKENIZER_BATCH, len(images)),
            learning_rate=RATE_TIMES_WIDTH / config.width,
            weight_decay=0.0,
            crop_min=given.crop_min,
        ),
        given.device,
    )
    dataset = SameImages(images, ViewConfig(image_size=side, crop_min=given.crop_min))
    pilot = _untrained(config).to(given.device)
    at = {"device": given.device, "clock": CLOCKS[given.clock]}
    step = step_seconds(pilot, tokenizer_task(pilot, seed=0), dataset, training, **at)
    training = dataclasses.replace(training, steps=num_steps(given.tokenizer_seconds, step))
    model = _untrained(config).to(given.device)
    course = train(model, tokenizer_task(model, seed=0), dataset, training, look=dict, points=1, **at)
    model = model.eval().to("cpu")
    save_tokenizer(model, folder)
    facts = {"seconds": round(course.seconds(), 1), "steps": training.steps, **_quality(model, unseen)}
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(f"tokenizer: {json.dumps(facts)}", flush=True)


def _pictures(index: Index) -> ImageDataset:
    """The images of `index`, decoded; what looks at them makes views of its own."""
    return decoded(ImageDataset(index, ViewConfig(image_size=1), cache_bytes=CACHE_BYTES))


def _untrained(config: TokenizerConfig) -> DiscreteVAE:
    return DiscreteVAE(config, generator=generator_for(0, "init", "tokenizer"))


def _quality(model: DiscreteVAE, unseen: Index) -> dict[str, float]:
    dataset = ImageDataset(unseen, ViewConfig(image_size=model.config.image_size))
    places = range(min(MEASURED, len(dataset)))
    with torch.no_grad():
        found = evaluate_tokenizer(model, (dataset.eval_image(place)[None].float() / 255 for place in places))
        return {name: round(value, 3) for name, value in found}


def _facts(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What the tokenizer's training took; --tokenizer-seconds where it was made by something else."""
    file = folder / FACTS
    if not file.exists():
        return {"seconds": given.tokenizer_seconds}
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def _labelled(both: tuple[Index, Index], most: int) -> tuple[Labelled, Labelled]:
    return Labelled(both[0], most), Labelled(both[1], most)
