"""REVDET: tell for every token position whether its token was replaced.

Shape letters in this file:
    B  images      N  token positions      D  feature channels      h  feature positions a side

CIM (arXiv 2202.03382), section on REVDET: a position counts as replaced only where the drawn token
differs from the golden one, and the loss runs over all N positions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.config import ObjectiveConfig
from cim_core.models.heads import DetectionHead
from cim_core.objectives.base import Objective, ObjectiveOutput, Truth

_HEAT = 0.6  # how much of a picture the heat colour covers at probability 1


class Revdet(Objective):
    """Head and loss: binary cross-entropy of one logit a position against `replaced`."""

    def __init__(
        self, config: ObjectiveConfig, *, width: int, feature_side: int, image_size: int, grid: int
    ) -> None:
        super().__init__()
        del image_size
        self.grid = grid
        self.head = DetectionHead(
            width, feature_side=feature_side, target_side=grid, upsample=config.upsample
        )

    def forward(self, features_BDhh: Tensor, truth: Truth) -> ObjectiveOutput:
        """Judge features [B, D, h, h]; the prediction is one logit a position, [B, N]."""
        logits_BN = self.head(features_BDhh).float()
        labels_BN = truth.replaced_BN
        loss = F.binary_cross_entropy_with_logits(logits_BN, labels_BN.float())
        metrics = {
            "revdet_balanced_accuracy": balanced_accuracy(logits_BN.detach() > 0, labels_BN),
            "revdet_auc": area_under_roc(logits_BN.detach(), labels_BN),
            "revdet_positive_rate": labels_BN.float().mean(),
        }
        return ObjectiveOutput(loss=loss, metrics=metrics, prediction=logits_BN)

    def picture(self, prediction: Tensor, *, clean_B3HW: Tensor, corrupted_B3HW: Tensor) -> Tensor:
        """The probabilities of logits [B, N] as red over the grey corrupted image, [B, 3, H, W] in [0, 1]."""
        del clean_B3HW
        heat_B1gg = prediction.float().sigmoid().view(-1, 1, self.grid, self.grid)
        heat_B1HW = _HEAT * F.interpolate(heat_B1gg, size=corrupted_B3HW.shape[-2:], mode="nearest")
        red = torch.tensor([1.0, 0.0, 0.0], device=prediction.device)[:, None, None]
        grey_B1HW = corrupted_B3HW.mean(dim=1, keepdim=True)  # colours would pass for heat
        return grey_B1HW * (1 - heat_B1HW) + red * heat_B1HW


def balanced_accuracy(guessed_BN: Tensor, labels_BN: Tensor) -> Tensor:
    """Mean of the shares found of positives and of negatives; of one kind only where the other is absent."""
    right_BN = (guessed_BN == labels_BN).float()
    kinds = [labels_BN.float(), 1 - labels_BN.float()]
    shares = torch.stack([(right_BN * kind).sum() / kind.sum().clamp(min=1) for kind in kinds])
    present = torch.stack([kind.any().float() for kind in kinds])
    return (shares * present).sum() / present.sum()


def area_under_roc(scores_BN: Tensor, labels_BN: Tensor) -> Tensor:
    """Chance that a positive scores above a negative, ties counted half; 0.5 where one kind is absent.

    The rank-sum statistic of Mann and Whitney with tied values at their mean rank. Ranks are counted in
    whole numbers, so the result is exact up to the last division; nothing is read back from the device.
    """
    scores, positive = scores_BN.flatten(), labels_BN.flatten()
    ordered = scores.sort().values
    below, up_to = torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)
    twice_mean_rank = below + up_to + 1
    num_positives, num_negatives = positive.sum(), (~positive).sum()
    twice_wins = (twice_mean_rank * positive).sum() - num_positives * (num_positives + 1)
    pairs = num_positives * num_negatives
    return torch.where(pairs > 0, twice_wins / (2 * pairs).clamp(min=1), 0.5)
