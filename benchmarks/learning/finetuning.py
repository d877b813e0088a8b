"""All layers trained on labelled images: from a pre-trained encoder, or (random weights) from scratch.

Shape letters in this file:
    B  images      c  classes
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.learning.budget import Clock, num_steps, step_seconds, train
from cim_core.config import TrainingConfig
from cim_core.data.dataset import ImageDataset, Views
from cim_core.evaluation.features import normalise
from cim_core.models.enhancer import Enhancer


@dataclass(frozen=True)
class Output:
    """What the loop wants of a pass."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Length:
    """How long to fine-tune: equal steps for all encoders, or as many as fit into the seconds."""

    seconds: float
    steps: int | None = None  # None: the seconds decide

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.seconds > 0 if self.steps is None else self.steps > 0

    def fact(self) -> float | str:
        """What records tell of it."""
        return self.seconds if self.steps is None else f"{self.steps} steps"


class Classifier(nn.Module):
    """An encoder, the mean over its positions, and a linear layer that begins at zero."""

    def __init__(self, enhancer: Enhancer, num_classes: int) -> None:
        super().__init__()
        self.enhancer = copy.deepcopy(enhancer)
        with torch.random.fork_rng(devices=[]):
            self.head = nn.Linear(enhancer.width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Logits [B, c] of uint8 images."""
        logits_Bc: Tensor = self.head(self.enhancer(normalise(pixels_B3HW)).mean(dim=(2, 3)))
        return logits_Bc


class ClassifyTask:
    """Cross-entropy on the labels of the batch's images."""

    def __init__(self, model: Classifier, dataset: ImageDataset) -> None:
        self._model = model
        self._labels = torch.tensor([dataset.label(place) for place in range(len(dataset))])

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        """One pass."""
        del step, micro, rank, progress
        labels_B = self._labels[batch.ids_B2[:, 1]].to(batch.pixels_B3HW.device)
        logits_Bc = self._model(batch.pixels_B3HW)
        return Output(F.cross_entropy(logits_Bc, labels_B), {})


def finetuned(
    enhancer: Enhancer,
    train_set: ImageDataset,
    val_set: ImageDataset,
    training: TrainingConfig,
    *,
    length: Length,
    device: torch.device,
    clock: Clock,
) -> dict[str, float]:
    """Accuracy on `val_set` after `length` of training on `train_set`; `enhancer` itself is left alone."""
    num_classes = len(train_set.index.classes)

    def made() -> tuple[Classifier, ClassifyTask]:
        model = Classifier(enhancer, num_classes).to(device)
        return model, ClassifyTask(model, train_set)

    steps = length.steps
    if steps is None:
        taken = step_seconds(*made(), train_set, training, device=device, clock=clock)
        steps = num_steps(length.seconds, taken)
    training = dataclasses.replace(training, steps=steps, epochs=None, images=None)
    model, task = made()
    course = train(model, task, train_set, training, look=dict, points=1, device=device, clock=clock)
    return {
        "finetune": _accuracy(model, val_set, device=device),
        "finetune_steps": float(steps),
        "finetune_seconds": course.seconds(),
    }


@torch.no_grad()
def _accuracy(model: Classifier, dataset: ImageDataset, *, device: torch.device) -> float:
    model.eval()
    right = 0
    for first in range(0, len(dataset), 128):
        places = range(first, min(first + 128, len(dataset)))
        pixels_B3HW = torch.stack([dataset.eval_image(place) for place in places]).to(device)
        labels_B = torch.tensor([dataset.label(place) for place in places])
        right += int((model(pixels_B3HW).argmax(dim=1).cpu() == labels_B).sum())
    return right / len(dataset)
