"""Weighted k-nearest-neighbour accuracy of features (Wu et al. 2018, as used by DINO).

Shape letters in this file:
    T  training images      V  images to classify      v  one portion of them      d  feature width
    k  neighbours           c  classes

A neighbour of cosine similarity s votes for its class with weight exp(s / temperature).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_core.errors import DataError

PORTION = 1024  # queries at a time: similarities of 1024 x 1.3 million images are 5 GB


def weighted_knn(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> float:
    """The share of images, 0 to 1, whose class the vote of their neighbours names.

    Args:
        train_x: features [T, d] of labelled images, any float type and scale.
        train_y: their classes, int64 [T], below `num_classes`.
        val_x: features [V, d] to classify.
        val_y: their true classes, int64 [V].
        k: neighbours that vote.
        temperature: the lower, the more the nearest ones count.
        num_classes: c.

    Raises:
        DataError: no image to classify, or fewer than `k` training images.
    """
    if len(val_x) == 0:
        raise DataError("probe.val: there is no image to classify")
    if k > len(train_x):
        raise DataError(
            f"the k-NN probe wants k = {k} neighbours, but probe.train has {len(train_x)} images;"
            " lower k or add images"
        )
    guesses_V = predict(train_x, train_y, val_x, k=k, temperature=temperature, num_classes=num_classes)
    return (guesses_V == val_y.to(guesses_V.device)).float().mean().item()


def predict(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """The class that the neighbours vote for: int64 [V]. Of equal votes the lowest class wins."""
    bank_Td = F.normalize(train_x.float(), dim=1)
    portions = torch.split(F.normalize(val_x.float(), dim=1), PORTION)
    votes = (
        _votes(bank_Td, train_y, part, k=k, temperature=temperature, num_classes=num_classes)
        for part in portions
    )
    return torch.cat([votes_vc.argmax(dim=1) for votes_vc in votes])


def _votes(
    bank_Td: Tensor, train_y: Tensor, queries_vd: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Sum of weights for each class: [v, c]."""
    nearest_vk, places_vk = (queries_vd @ bank_Td.T).topk(k, dim=1)
    # Relative to the nearest neighbour: the winner is the same, and a low temperature cannot overflow.
    weights_vk = ((nearest_vk - nearest_vk[:, :1]) / temperature).exp()
    votes_vc = weights_vk.new_zeros(len(queries_vd), num_classes)
    return votes_vc.scatter_add_(1, train_y.to(places_vk.device)[places_vk], weights_vk)
