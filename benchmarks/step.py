"""Seconds of one CIM training step by part, on the CPU, for ViT and ResNet with both objectives.

Each part is timed alone, in turns with the whole step and with a plain forward and backward pass of
the enhancer, which is what a step of supervised training of the same network would cost.
Ratios: whole / sum of the parts (about 1 when nothing is missing), whole / enhancer alone.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Times, in_turns, median_ratio, total
from cim_core.cim import CIM, build_cim, sample_tokens, to_unit
from cim_core.config import (
    EnhancerConfig,
    GeneratorConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import ImageDataset, ViewConfig, Views
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.durations import plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.masking import make_mask
from cim_core.objectives.base import Truth
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE

TILES = Path(__file__).resolve().parent.parent / "examples" / "photos" / "train.tar"
SIDE, PATCH, BATCH = 64, 8, 16
ENHANCERS = {
    "ViT": EnhancerConfig(name="vit_tiny_patch16_224", shared_blocks=2, options={"depth": 6}),
    "ResNet": EnhancerConfig(name="resnet18", shared_blocks=0),
}
OBJECTIVES = ("respix", "revdet")
PARTS = ("data", "tokenizer encode", "generator", "sampling and decode", "enhancer", "optimizer")
WHOLE, BARE = "whole step", "enhancer alone"
TRAINING = TrainingConfig(steps=10**6, batch_size=BATCH, precision="fp32", crop_min=0.3)


class Step:
    """One training setup, cut into parts that can be run alone."""

    def __init__(self, enhancer: EnhancerConfig, objective: str) -> None:
        self.cim = _model(enhancer, objective)
        self.dataset = ImageDataset(scan(TILES), ViewConfig(image_size=SIDE, token_size=SIDE, crop_min=0.3))
        self.plan = plan(TRAINING, num_images=len(self.dataset))
        self.batches = ImageLoader(self.dataset, batch_size=BATCH).steps(0, self.plan.total_steps)
        self.views: Views = next(self.batches)
        self.state = TrainState(model=self.cim, optimizer=build_optimizer(self.cim, TRAINING))
        self.truth, self.tokens_BN = self._intermediates()

    def parts(self) -> Mapping[str, Callable[[], object]]:
        """What is timed, by name."""
        return {
            "data": self.data,
            "tokenizer encode": lambda: self.cim.tokenize(self.views.token_pixels_B3HW),
            "generator": self.generator,
            "sampling and decode": self.sampling,
            "enhancer": self.enhancer,
            "optimizer": self.optimizer,
            WHOLE: self.whole,
            BARE: self.bare,
        }

    def data(self) -> None:
        """Decode, crop and resize one batch in this thread, with nothing prepared ahead."""
        loader = ImageLoader(self.dataset, batch_size=BATCH)
        for key in loader.samples(self.state.step):
            self.dataset[key]

    def generator(self) -> None:
        """The small BEiT, forward and backward, with its loss."""
        logits_MV = self.cim.generator(self.cim.normalise(self.truth.clean_B3HW), self.truth.mask_BN)
        golden_M = self.tokens_BN[self.truth.mask_BN]
        loss = torch.nn.functional.cross_entropy(logits_MV, golden_M)
        loss.backward()  # type: ignore[no-untyped-call]

    def sampling(self) -> None:
        """Draw tokens and let the frozen decoder paint them."""
        masked_M = self.tokens_BN[self.truth.mask_BN]
        logits_MV = torch.zeros(len(masked_M), self.cim.tokenizer.vocab_size)
        sampled_M = sample_tokens(logits_MV, 1.0, generator_for(0, "bench"))
        self.cim.corrupt(self.tokens_BN.masked_scatter(self.truth.mask_BN, sampled_M))

    def enhancer(self) -> None:
        """Enhancer, head and loss, forward and backward."""
        features_BDhh = self.cim.enhancer(self.cim.normalise(self.truth.clean_B3HW))
        self.cim.objective(features_BDhh, self.truth).loss.backward()

    def optimizer(self) -> None:
        """Norm and clipping of the gradients, update of the weights."""
        torch.nn.utils.clip_grad_norm_(self.cim.parameters(), TRAINING.clip_norm)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=False)

    def whole(self) -> None:
        """The step as the workers do it, its data made in the background as there."""
        views = next(self.batches)
        train_step(
            cim_task(self.cim, seed=0),
            self.state,
            views,
            plan=self.plan,
            training=TRAINING,
            device=torch.device("cpu"),
        )

    def bare(self) -> None:
        """The enhancer alone, forward and backward, without any of our heads."""
        self.cim.enhancer(self.cim.normalise(self.truth.clean_B3HW)).mean().backward()

    def _intermediates(self) -> tuple[Truth, torch.Tensor]:
        tokens_BN = self.cim.tokenize(self.views.token_pixels_B3HW)
        mask_BN = make_mask(BATCH, self.cim.grid, self.cim.config.masking, generator_for(0, "bench", "mask"))
        clean_B3HW = to_unit(self.views.pixels_B3HW)
        return Truth(clean_B3HW=clean_B3HW, mask_BN=mask_BN, replaced_BN=mask_BN), tokens_BN


def _model(enhancer: EnhancerConfig, objective: str) -> CIM:
    config = TokenizerConfig(width=32, vocab_size=256)
    tokenizer = DiscreteVAE(config, generator=generator_for(0, "bench", "tokenizer"))
    model = ModelConfig(
        tokenizer=TokenizerSource(source="untrained"),
        enhancer=enhancer,
        objective=ObjectiveConfig(name=objective),  # type: ignore[arg-type]
        generator=GeneratorConfig(depth=4, width=192, heads=3),
        image_size=SIDE,
        patch_size=PATCH,
    )
    return build_cim(model, tokenizer)


def measure(*, rounds: int, warmup: int) -> dict[str, dict[str, Times]]:
    """Times of all parts for each enhancer and objective."""
    measured = {}
    for name, enhancer in ENHANCERS.items():
        for objective in OBJECTIVES:
            step = Step(enhancer, objective)
            measured[f"{name} {objective}"] = in_turns(step.parts(), rounds=rounds, warmup=warmup)
            step.batches.close()
    return measured


def ratios(times: Mapping[str, Times]) -> dict[str, float]:
    """The whole step beside its parts and beside the enhancer alone."""
    whole = times[WHOLE]
    return {
        "whole / sum of parts": median_ratio(whole, total([times[name] for name in PARTS])),
        "whole / enhancer alone": median_ratio(whole, times[BARE]),
    }


def report(measured: Mapping[str, Mapping[str, Times]]) -> dict[str, Any]:
    """Everything as JSON."""
    setup = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    cases = {
        case: {"parts": {n: t.as_json() for n, t in times.items()}, "ratios": ratios(times)}
        for case, times in measured.items()
    }
    return {"setup": setup, "cases": cases}


def show(measured: Mapping[str, Mapping[str, Times]]) -> Table:
    """Everything as a table: milliseconds, median (fastest to slowest)."""
    threads = torch.get_num_threads()
    title = (
        f"ms a step of {BATCH} images, {SIDE} px, fp32, {threads} CPU threads: median (fastest to slowest)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for case in measured:
        table.add_column(case, justify="right")
    for name in (*PARTS, WHOLE, BARE):
        table.add_row(name, *(_cell(times[name]) for times in measured.values()))
    for name in ratios(next(iter(measured.values()))):
        table.add_row(name, *(f"{ratios(times)[name]:.2f}" for times in measured.values()))
    return table


def _cell(times: Times) -> str:
    return f"{times.median * 1e3:.0f} ({times.low * 1e3:.0f}-{times.high * 1e3:.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    measured = measure(rounds=given.rounds, warmup=given.warmup)
    if given.json:
        print(json.dumps(report(measured), indent=1))
    else:
        Console(width=120).print(show(measured))


if __name__ == "__main__":
    main()
