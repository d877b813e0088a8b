"""One CIM training step beside a straightforward composition of the same networks, in turns.

    python -m benchmarks.train_step                            two small cases, for CPUs
    python -m benchmarks.train_step --gpu                      ViT-B/16, ViT-S/16, ResNet-50 at 224 px
    python -m benchmarks.train_step --training '{"compile": true}' --save benchmarks/results

Needs torch and timm alone. First both are given the same weights, images, masks and samples in fp32, and
must come to the same losses; then they train, each in its own way (benchmarks/plain_step.py). The
tokenizer has DALL-E's layout and random weights; reading images is no part of a step.
"""

import argparse
import copy
import itertools
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from benchmarks.plain_step import PlainStep
from benchmarks.step_cases import CPU_CASES, GPU_CASES, Case, cim_of, peer_of, peers, pictures
from benchmarks.timing import Times, in_turns, median_ratio
from cim_core.cim import CIM, sample_tokens
from cim_core.config import TrainingConfig
from cim_core.data.dataset import Views
from cim_core.durations import plan
from cim_core.engine.acceleration import accelerate
from cim_core.engine.precision import with_precision
from cim_core.engine.state import TrainState
from cim_core.engine.step import StepResult, train_step
from cim_core.engine.transfer import on_device
from cim_core.estimate.dry_run import MemoryMeter, multiplications
from cim_core.masking import masked_positions
from cim_core.objectives.base import Truth
from cim_core.optim import build_optimizer
from cim_core.pretraining import to_unit
from cim_core.seeding import generator_for
from cim_core.task import cim_task

OURS, PLAIN = "our step", "plain step"
PARTS = ("tokenizer encode", "generator", "sampling and decode", "enhancer", "optimizer")
SAME = 1e-4  # relative difference of the losses that rounding may make
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}  # of the product whose speed is the peak


class OurSteps:
    """Steps as `fit` does them: batches come ahead, numbers are read when the next step is queued."""

    def __init__(self, model: nn.Module, views: Views, training: TrainingConfig, device: torch.device):
        self.device, self.training = device, with_precision(training, device)
        self.views = views.pin() if device.type == "cuda" else views
        self.batches = on_device(itertools.repeat(self.views), device)
        accelerate(model.train(), self.training, device)
        self.model, self.task = model, cim_task(model, seed=0)
        self.state = TrainState(model=model, optimizer=build_optimizer(model, self.training))
        self.plan = plan(self.training, num_images=self.training.batch_size)
        self.unread: StepResult | None = None

    def step(self) -> None:
        """One step, with the way of its images to the device."""
        result = train_step(
            self.task,
            self.state,
            next(self.batches),
            plan=self.plan,
            training=self.training,
            device=self.device,
        )
        if self.unread is not None:
            self.unread.read(self.state)
        self.unread = result


class Parts:
    """The parts of our step, each to be run alone on what a step has left behind."""

    def __init__(self, ours: OurSteps, cim: CIM) -> None:
        self.ours, self.cim, self.device = ours, cim, ours.device
        self.views = ours.views.to(ours.device)
        with torch.no_grad(), self._precision():
            output = cim(self.views, generator=generator_for(0, "bench", "parts"))
        self.output, self.positions_M = output, masked_positions(output.mask_BN)
        self.truth = Truth(
            clean_B3HW=output.clean_B3HW, mask_BN=output.mask_BN, replaced_BN=output.replaced_BN
        )

    def by_name(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        made = (self.encode, self.generator, self.decode, self.enhancer, self.optimizer)
        return dict(zip(PARTS, made, strict=True))

    def encode(self) -> None:
        """Golden tokens."""
        with self._precision():
            self.cim.tokenize(self.views.token_pixels_B3HW)

    def generator(self) -> None:
        """The small BEiT, forward and backward, with its loss."""
        with self._precision():
            images_B3HW = self.cim.normalise(to_unit(self.views.pixels_B3HW))
            logits_MV = self.cim.generator(images_B3HW, self.output.mask_BN, self.positions_M)
        golden_M = self.output.golden_BN.take(self.positions_M)
        nn.functional.cross_entropy(logits_MV.float(), golden_M).backward()  # type: ignore[no-untyped-call]

    def decode(self) -> None:
        """Samples, and the picture that the frozen decoder paints."""
        with self._precision():
            sample_tokens(self.output.logits_MV, 1.0, generator_for(0, "bench"))
            self.cim.corrupt(self.output.sampled_BN)

    def enhancer(self) -> None:
        """Enhancer, head and loss, forward and backward."""
        with self._precision():
            features_BDhh = self.cim.enhancer(self.cim.normalise(self.output.corrupted_B3HW))
            judged = self.cim.objective(features_BDhh, self.truth)
        judged.loss.backward()

    def optimizer(self) -> None:
        """Norm and clipping of the gradients, update of the weights; the gradients stay."""
        nn.utils.clip_grad_norm_(self.cim.parameters(), self.ours.training.clip_norm)
        self.ours.state.optimizer.step()

    def _precision(self) -> torch.autocast:
        enabled = self.ours.training.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case."""

    times: Mapping[str, Times]  # of a step, or of a part of one
    macs_per_image: Mapping[str, float]  # forward and backward
    peak_bytes: Mapping[str, int]  # beyond weights and moments
    peak_flops: float  # of a matrix product in the step's format, measured
    batch_size: int

    def summary(self) -> dict[str, float]:
        """What the case comes to."""
        seconds = self.times[OURS].median
        flops = 2 * self.macs_per_image[OURS] * self.batch_size / seconds
        ratios = {
            f"{name} / {OURS}": median_ratio(times, self.times[OURS])
            for name, times in self.times.items()
            if name not in (OURS, *PARTS)
        }
        return {
            "images/s": self.batch_size / seconds,
            "images/s, plain": self.batch_size / self.times[PLAIN].median,
            **ratios,
            "share of the measured matrix peak": flops / self.peak_flops,
        }


def check_same_losses(cim: CIM, views: Views, device: torch.device) -> None:
    """Both compositions on the same masks and samples, in fp32. AssertionError where they differ."""
    with torch.no_grad(), _exact_products():
        output = cim(views.to(device), generator=generator_for(0, "bench", "check"))
        plain = PlainStep(cim, log=print).losses(views, mask_BN=output.mask_BN, sampled_BN=output.sampled_BN)
    for ours, theirs in zip(output.losses.values(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=SAME, atol=0.0)


class _exact_products:  # noqa: N801
    """No TensorFloat-32, which would differ between layouts."""

    def __enter__(self) -> None:
        self._was = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._was


def measure(
    case: Case,
    objective: Literal["respix", "revdet"],
    *,
    training: TrainingConfig,
    device: torch.device,
    steps: int,
    rounds: int,
    warmup: int,
) -> Measured:
    """Check the case, then time `rounds` rounds of `steps` steps of each."""
    training = replace(training, batch_size=case.batch_size)
    views = pictures(case)
    cim = cim_of(case, objective).to(device)
    assert isinstance(cim, CIM)
    check_same_losses(cim.train(), views, device)
    plain = PlainStep(copy.deepcopy(cim), log=lambda _: None)
    ours = OurSteps(cim, views, training, device)
    rivals = {
        name: OurSteps(peer_of(case, method).to(device), views, training, device)
        for name, method in peers(case).items()
    }
    ours.step()
    parts = Parts(ours, cim).by_name()
    whole: dict[str, Callable[[], object]] = {OURS: ours.step, PLAIN: lambda: plain.step(views)}
    whole |= {name: peer.step for name, peer in rivals.items()}
    optimizers = {OURS: ours.state.optimizer, PLAIN: plain.optimizer}
    optimizers |= {name: peer.state.optimizer for name, peer in rivals.items()}
    everything = {**whole, **parts}
    repeated = {name: _repeated(run, steps=steps, device=device) for name, run in everything.items()}
    times = in_turns(repeated, rounds=rounds, warmup=warmup)
    return Measured(
        times={name: Times(seconds=tuple(s / steps for s in t.seconds)) for name, t in times.items()},
        macs_per_image={name: multiplications(run) / case.batch_size for name, run in everything.items()},
        peak_bytes={name: peak_bytes(run, optimizers[name], device) for name, run in whole.items()},
        peak_flops=matrix_peak(ours.training.precision == "bf16", device),
        batch_size=case.batch_size,
    )


def _repeated(run: Callable[[], object], *, steps: int, device: torch.device) -> Callable[[], None]:
    def several() -> None:
        for _ in range(steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return several


def peak_bytes(run: Callable[[], object], optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """The most memory that a step holds beyond what there is before it.

    The gradients of the step before are given back first, so this step's own are in the figure. On a GPU
    the plain step's figure has its pictures too; ours do not: a batch already lies there.
    """
    optimizer.zero_grad(set_to_none=True)
    if device.type != "cuda":
        with MemoryMeter() as meter:
            run()
        peak: int = meter.peak_bytes
        return peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def matrix_peak(bf16: bool, device: torch.device) -> float:  # noqa: FBT001
    """Operations a second of a large matrix product, two for each multiply-accumulate."""
    side = MATRIX_SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    run = _repeated(lambda: a @ a, steps=10, device=device)
    return 10 * 2 * side**3 / in_turns({"product": run}, rounds=5, warmup=1)["product"].low


def setup(device: torch.device, training: TrainingConfig) -> dict[str, Any]:
    """Date, chip, versions, and the training but for the batch, whose size each case has its own."""
    given = asdict(with_precision(training, device))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "training": {k: v for k, v in given.items() if v is not None and k != "batch_size"},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def as_json(measured: Measured) -> dict[str, Any]:
    """Everything that was measured of a case."""
    return {
        "summary": measured.summary(),
        "times": {name: times.as_json() for name, times in measured.times.items()},
        "macs_per_image": dict(measured.macs_per_image),
        "peak_bytes": dict(measured.peak_bytes),
        "batch_size": measured.batch_size,
    }


def table(title: str, measured: Measured) -> str:
    """One case as text."""
    share_of = sum(measured.times[name].median for name in PARTS)
    lines = [
        f"\n{title}, {measured.batch_size} images a step",
        f"{'':26}{'ms, median (low to high)':>28}{'share':>8}{'GMACs an image':>17}{'peak MiB':>10}",
    ]
    for name, times in measured.times.items():
        span = f"{times.median * 1e3:.1f} ({times.low * 1e3:.1f} to {times.high * 1e3:.1f})"
        share = f"{times.median / share_of:.0%}" if name in PARTS else ""
        peak = measured.peak_bytes.get(name)
        held = f"{peak / 2**20:.0f}" if peak is not None else ""
        gmacs = measured.macs_per_image[name] / 1e9
        lines.append(f"{name:26}{span:>28}{share:>8}{gmacs:>17.2f}{held:>10}")
    lines += [f"{name}: {value:.3g}" for name, value in measured.summary().items()]
    return "\n".join(lines)


def save(found: Mapping[str, Any], folder: Path, *, name: str) -> Path:
    """Write a new file `name`.json into `folder`, or `name`-2.json and so on where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    path, number = folder / f"{name}.json", 1
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            number += 1
            path = folder / f"{name}-{number}.json"
        else:
            return path


def main() -> None:
    """Measure, print, and write a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the cases of 224 px, on cuda")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--objective", default="respix", choices=["respix", "revdet"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, help="steps a round; 10 on a GPU, else 1")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--training", type=json.loads, default={}, help="keys of TrainingConfig, as JSON")
    parser.add_argument("--save", type=Path, help="folder for a file with the results as JSON")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device("cuda" if given.gpu else "cpu")
    every = GPU_CASES if given.gpu else CPU_CASES
    cases = {name: case for name, case in every.items() if given.only in name}
    training = TrainingConfig(**{"steps": 10**6, **given.training})
    facts = setup(device, training)
    print(f"{facts['chip']}, {facts['threads']} threads, torch {facts['torch']}, {facts['training']}")
    found: dict[str, Any] = {"setup": facts, "objective": given.objective, "cases": {}}
    for name, case in cases.items():
        measured = measure(
            case,
            given.objective,
            training=training,
            device=device,
            steps=given.steps or (10 if given.gpu else 1),
            rounds=given.rounds,
            warmup=given.warmup,
        )
        print(table(name, measured), flush=True)
        found["cases"][name] = as_json(measured)
    if given.save:
        path = save(found, given.save, name=f"train_step-{facts['date']}-{'gpu' if given.gpu else 'cpu'}")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
