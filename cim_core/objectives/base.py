"""What an objective of the enhancer gets and gives.

Shape letters in this file:
    B  images      N  token positions      D  feature channels      h  feature positions a side
    H, W  image height and width, pixels
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from cim_core.models.heads import UpscaleHead


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of a corrupted image."""

    clean_B3HW: Tensor  # the original, [0, 1]
    mask_BN: Tensor  # True where a token was drawn by the generator
    replaced_BN: Tensor  # True where the drawn token differs from the golden one


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """The loss of one batch; metrics stay on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]
    prediction: Tensor  # respix [B, 3, H, W], normalised pixels; revdet [B, N], logits


class Objective(nn.Module, ABC):
    """The enhancer's head and loss."""

    head: UpscaleHead  # of features [B, D, h, h]; all that the objective trains

    @abstractmethod
    def forward(self, features_BDhh: Tensor, truth: Truth) -> ObjectiveOutput:
        """Judge the enhancer's features of the corrupted images."""

    @abstractmethod
    def picture(self, prediction: Tensor, *, clean_B3HW: Tensor, corrupted_B3HW: Tensor) -> Tensor:
        """What the prediction looks like: [B, 3, H, W] in [0, 1]."""
