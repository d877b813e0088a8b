"""What a look at a running pre-training says beside its losses; docs/method.md tells how to read it.

Shape letters in this file:
    B  images      D  feature channels      h  feature positions a side      P  parameters that are shared

A look draws from the generator that it is given, changes no weight, gradient, buffer or mode, and talks
to no other rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.cim import CIM
from cim_core.data.dataset import Views
from cim_core.evaluation.features import evaluating, normalise
from cim_core.models.enhancer import Enhancer
from cim_core.pretraining import Pretraining

NUM_IMAGES = 64  # that a look at a training takes; RankMe can be no larger
PORTION = 8  # images at a time: a look must fit where a step does
RANKME_EPSILON = 1e-7  # added to each share; the paper's, for float32


def diagnose(model: Pretraining, views: Views, *, generator: torch.Generator) -> dict[str, float]:
    """Numbers that explain the run, by metric name.

    `diag_feature_std` and `diag_rankme` are of the enhancer on the real images of `views`. A CIM model
    that shares layers adds `diag_gradient_generator`, `diag_gradient_enhancer` and
    `diag_gradient_cosine`: both losses' gradients there, weighted as in the loss.
    """
    found = feature_statistics(mean_features(model.enhancer, views.pixels_B3HW))
    if isinstance(model, CIM):
        found |= shared_gradients(model, views, generator=generator)
    return {f"diag_{name}": value for name, value in found.items()}


@torch.no_grad()
def mean_features(enhancer: Enhancer, pixels_B3HW: Tensor) -> Tensor:
    """Features [B, D] of uint8 images: the mean over the positions of the map that the objective sees."""
    with evaluating(enhancer):
        parts = [
            enhancer(normalise(part)).float().mean(dim=(2, 3)) for part in torch.split(pixels_B3HW, PORTION)
        ]
    return torch.cat(parts)


def feature_statistics(features_BD: Tensor) -> dict[str, float]:
    """How far the features of several images are from all being the same."""
    return {"feature_std": feature_std(features_BD), "rankme": rank_me(features_BD)}


def feature_std(features_BD: Tensor) -> float:
    """Mean deviation of a channel of L2-normalised features, times sqrt(D): 0 collapsed, 1 spread evenly.

    The measure of SimSiam (arXiv 2011.10566, section 4.1), there without the factor.
    """
    deviation_D = F.normalize(features_BD, dim=1).std(dim=0, correction=0)
    return float(deviation_D.mean() * features_BD.shape[1] ** 0.5)


def rank_me(features_BD: Tensor) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885): exp of the entropy of the singular values' shares.

    From 1 to min(B, D); not a number where a feature is not finite.
    """
    if not torch.isfinite(features_BD).all():
        return float("nan")
    values = torch.linalg.svdvals(features_BD)
    shares = values / values.sum() + RANKME_EPSILON
    return float((-(shares * shares.log()).sum()).exp())


def shared_gradients(cim: CIM, views: Views, *, generator: torch.Generator) -> dict[str, float]:
    """Norms and cosine of both losses' gradients on shared layers; nothing where no layer is shared.

    Each is the mean over portions of `PORTION` images, so the norms do not hang on the training's batch.
    """
    shared = cim.generator.shared_parameters()
    if not shared:
        return {}
    sums_2P = torch.zeros(2, sum(p.numel() for p in shared), device=shared[0].device)
    portions = views.portions(PORTION)
    with evaluating(cim), torch.enable_grad():
        for portion in portions:
            output = cim(portion, generator=generator)
            (enhancer_loss,) = (loss for name, loss in output.losses.items() if name != "mim")
            for row_P, loss in zip(sums_2P, (output.losses["mim"], cim.weight * enhancer_loss), strict=True):
                row_P += torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared)])
    of_generator_P, of_enhancer_P = sums_2P / len(portions)
    return {
        "gradient_generator": float(of_generator_P.norm()),
        "gradient_enhancer": float(of_enhancer_P.norm()),
        "gradient_cosine": float(F.cosine_similarity(of_generator_P, of_enhancer_P, dim=0)),
    }
