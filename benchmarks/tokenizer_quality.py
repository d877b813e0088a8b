"""How good a tokenizer becomes on your images, for one or more settings: PSNR, SSIM and codebook.

    python -m benchmarks.tokenizer_quality --train IMAGES --val IMAGES --steps 600 --set quantiser=relaxed

Each `--set` (keys of the spec's `model`, comma between them) is one run; `rate=` is the peak learning rate,
`warmup=` the steps up to it. A cosine over all steps; the numbers hold for the validation images, scaled
and cut to the centre square.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from cim_core.config import Duration, TokenizerConfig, TokenizerTrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import scan
from cim_core.engine.callbacks import StepReport
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.evaluate import collapse, evaluate_tokenizer, reconstruction_grid
from cim_core.tokenizers.store import save_tokenizer
from cim_core.train import train_tokenizer

SHOWN = ("psnr", "perplexity", "codes_used")


class Watch:
    """A progress bar, and the curve."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._bar = progress, progress.add_task("training", total=steps)
        self.curve: list[dict[str, float]] = []

    def __call__(self, report: StepReport) -> None:
        point = {"step": report.step, "images_per_s": report.images_per_s}
        self.curve.append(point | {name: report.metrics[name] for name in SHOWN})
        told = "  ".join(f"{name} {report.metrics[name]:.3g}" for name in SHOWN)
        self._progress.update(self._bar, completed=report.step, description=told)


def main() -> None:
    """Train each setting and print its line."""
    options = _options()
    torch.set_num_threads(options.threads)
    val = scan(options.val)
    console = Console(stderr=True)
    for text in options.set or [""]:
        config, training = _settings(text, options)
        unseen = ImageDataset(val, ViewConfig(image_size=config.image_size))
        started = time.perf_counter()
        with Progress(console=console) as progress:
            watch = Watch(progress, options.steps)
            model = train_tokenizer(options.train, config, training, on_step=watch)
        record = {"set": text, "seconds": round(time.perf_counter() - started), "steps": options.steps}
        record |= _measure(model, unseen, options.val_images)
        record["collapse"] = collapse(record, config)
        print(json.dumps(record | ({"curve": watch.curve} if options.curve else {})), flush=True)
        if options.out:
            _keep(model, unseen, options.out / (text.replace("/", "-") or "default"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE[,...]")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--crop-min", type=float, default=0.3)
    parser.add_argument("--val-images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", action="store_true", help="print every tenth step as well")
    parser.add_argument("--out", type=Path, help="folder for tokenizers and pictures")
    return parser.parse_args()


def _settings(text: str, options: argparse.Namespace) -> tuple[TokenizerConfig, TokenizerTrainingConfig]:
    given: dict[str, Any] = {
        key: _value(value) for key, value in (part.split("=", 1) for part in text.split(",") if part)
    }
    schedule: dict[str, Any] = {"learning_rate": given.pop("rate")} if "rate" in given else {}
    if "warmup" in given:
        schedule["warmup"] = Duration(steps=given.pop("warmup"))
    training = TokenizerTrainingConfig(
        steps=options.steps, batch_size=options.batch, weight_decay=options.weight_decay, **schedule,
        precision=options.precision, crop_min=options.crop_min, seed=options.seed,
    )  # fmt: skip
    return replace(TokenizerConfig(), **given), training


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _measure(model: DiscreteVAE, unseen: ImageDataset, most: int) -> dict[str, Any]:
    images = (unseen.eval_image(place)[None].float() / 255 for place in range(min(most, len(unseen))))
    return {name: round(value, 4) for name, value in evaluate_tokenizer(model, images)}


def _keep(model: DiscreteVAE, unseen: ImageDataset, folder: Path) -> None:
    save_tokenizer(model, folder)
    few = torch.stack([unseen.eval_image(place) for place in range(8)]).float() / 255
    reconstruction_grid(model, few).save(folder / "reconstruction.png")


if __name__ == "__main__":
    main()
