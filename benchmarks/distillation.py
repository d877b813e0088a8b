"""Whether a narrow tokenizer that imitates a frozen one is worth having: what it saves and what it costs.

    python -m benchmarks.distillation --teacher FOLDER --train train.tar --val val.tar --out students

For each width two students get the same seconds: `distilled` learns the teacher's tokens (cross-entropy)
and the pictures that it paints of them (squared error); `from images` is an ordinary tokenizer, which
needs no teacher. Each is left in --out, where `benchmarks.learning --tokenizer` takes it up.

agreement       share of tokens that are the teacher's; for `from images` they mean something else
PSNR            of the student's own reconstruction, beside the image
PSNR, teacher's of the student's picture of the teacher's tokens, beside the teacher's picture of them
time            encoding and decoding an image, as a share of the teacher's; one thread, in turns

Shape letters in this file:
    B  images      H, W  image sides, pixels      h, w  tokens a side      V  vocabulary      D  code width
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.learning.budget import CLOCKS, num_steps, step_seconds, train
from benchmarks.learning.finetuning import Output
from benchmarks.timing import in_turns, median_ratio
from cim_core.config import TokenizerConfig, TokenizerTrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig, Views
from cim_core.data.index import scan
from cim_core.engine.precision import with_precision
from cim_core.engine.step import Task
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.network import map_pixels, unmap_pixels
from cim_core.tokenizers.quantise import LOGIT_GAIN
from cim_core.tokenizers.store import load_tokenizer, save_tokenizer
from cim_core.tokenizers.task import tokenizer_task
from cim_core.train import CPU

TIMED_IMAGES = 16
RATE = 4e-3  # peak, for students of width 16 and 32


class DistillationTask:
    """The teacher's tokens and the teacher's pictures, as targets of a student with its vocabulary."""

    def __init__(self, student: DiscreteVAE, teacher: DiscreteVAE) -> None:
        self._student, self._teacher = student, teacher

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        """Cross-entropy of the tokens in nats, and the squared error in nats at its best variance."""
        del step, micro, rank, progress
        images_B3HW = batch.pixels_B3HW.float() / 255
        ids_Bhw = self._teacher.encode(images_B3HW)
        logits_BVhw = LOGIT_GAIN * self._student.encoder(map_pixels(images_B3HW)).float()
        tokens = F.cross_entropy(logits_BVhw, ids_Bhw)
        pixels = F.mse_loss(painted(self._student, ids_Bhw), self._teacher.decode(ids_Bhw))
        metrics = {"tokens": tokens.detach(), "pixels": pixels.detach()}
        return Output(tokens + pixels.log() / 2, metrics)


def painted(student: DiscreteVAE, ids_Bhw: Tensor) -> Tensor:
    """The student's picture [B, 3, H, W] of tokens, not clamped and with a gradient."""
    logits_B3HW = student.decoder(student.quantiser.lookup(ids_Bhw))[:, :3]
    return unmap_pixels(logits_B3HW.float().sigmoid())


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What the students of one call have in common."""

    teacher: DiscreteVAE
    images: ImageDataset
    unseen: ImageDataset
    training: TokenizerTrainingConfig
    seconds: float
    clock: str
    num_measured: int


def main(words: list[str] | None = None) -> None:
    """Train each student and print its line."""
    given = _arguments(words)
    torch.set_num_threads(given.threads)
    teacher = load_tokenizer(given.teacher)
    assert isinstance(teacher, DiscreteVAE), "the teacher is a tokenizer that this project trains"
    side = teacher.config.image_size
    views = ViewConfig(image_size=side, crop_min=given.crop_min)
    training = TokenizerTrainingConfig(
        steps=1, batch_size=given.batch, learning_rate=RATE, weight_decay=0.0, crop_min=given.crop_min
    )
    lesson = Lesson(
        teacher=teacher,
        images=ImageDataset(scan(given.train), views),
        unseen=ImageDataset(scan(given.val), ViewConfig(image_size=side)),
        training=with_precision(training, CPU),  # type: ignore[arg-type]
        seconds=given.seconds,
        clock=given.clock,
        num_measured=given.val_images,
    )
    print(json.dumps({"student": "the teacher itself", **judged(teacher, lesson)}), flush=True)
    for width in given.widths:
        for name, config, task_of in _students(teacher, width):
            student = trained(config, task_of, lesson)
            folder = given.out / f"{name}-{width}"
            save_tokenizer(student, folder)
            print(json.dumps({"student": name, "width": width, **judged(student, lesson)}), flush=True)


TaskOf = Callable[[DiscreteVAE], Task[Views]]


def _students(teacher: DiscreteVAE, width: int) -> Iterator[tuple[str, TokenizerConfig, TaskOf]]:
    narrow = replace(teacher.config, width=width)
    yield (
        "distilled",
        replace(narrow, quantiser="relaxed"),
        lambda student: DistillationTask(student, teacher),
    )
    yield "from-images", narrow, lambda student: tokenizer_task(student, seed=0)


def trained(config: TokenizerConfig, task_of: TaskOf, lesson: Lesson) -> DiscreteVAE:
    """A student after its seconds, in eval mode."""

    def fresh() -> DiscreteVAE:
        return DiscreteVAE(config, generator=generator_for(0, "init", "tokenizer"))

    clock, pilot = CLOCKS[lesson.clock], fresh()
    step = step_seconds(pilot, task_of(pilot), lesson.images, lesson.training, device=CPU, clock=clock)
    student = fresh()
    training = replace(lesson.training, steps=num_steps(lesson.seconds, step))
    train(student, task_of(student), lesson.images, training, look=dict, points=1, device=CPU, clock=clock)
    return student.eval()


@torch.no_grad()
def judged(student: DiscreteVAE, lesson: Lesson) -> dict[str, float]:
    """The numbers of the module's docstring, rounded."""
    places = range(min(lesson.num_measured, len(lesson.unseen)))
    sums = torch.zeros(3, dtype=torch.float64)
    for place in places:
        image_13HW = lesson.unseen.eval_image(place)[None].float() / 255
        theirs, ours = lesson.teacher.encode(image_13HW), student.encode(image_13HW)
        own_error = F.mse_loss(student.decode(ours), image_13HW)
        copied = F.mse_loss(student.decode(theirs), lesson.teacher.decode(theirs))
        sums += torch.stack([(ours == theirs).double().mean(), own_error.double(), copied.double()])
    agreement, own_error, copied = (sums / len(places)).tolist()
    return {
        "agreement": round(agreement, 3),
        "psnr": round(_decibels(own_error), 2),
        "psnr_of_teachers_tokens": round(_decibels(copied), 2),
        "time": round(_time(student, lesson), 3),
    }


def _decibels(error: float) -> float:
    return float(-10 * torch.tensor(max(error, 1e-10)).log10())


def _time(student: DiscreteVAE, lesson: Lesson) -> float:
    side = lesson.teacher.config.image_size
    images_B3HW = torch.rand(TIMED_IMAGES, 3, side, side, generator=generator_for(0, "bench"))
    bf16 = lesson.training.precision == "bf16"

    def work(tokenizer: DiscreteVAE) -> Callable[[], object]:
        def both_ways() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                tokenizer.decode(tokenizer.encode(images_B3HW))

        return both_ways

    times = in_turns({"student": work(student), "teacher": work(lesson.teacher)}, rounds=7, warmup=1)
    return median_ratio(times["student"], times["teacher"])


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--seconds", type=float, default=200, help="training of each student")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--crop-min", type=float, default=0.3)
    parser.add_argument("--val-images", type=int, default=512)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("students"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
