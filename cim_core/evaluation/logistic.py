"""The linear probe: multinomial logistic regression on frozen features.

Shape letters in this file:
    T  training images      V  images to classify      d  feature width      c  classes

The loss is `mean cross-entropy + l2 / 2 * |weights|^2`, the bias free: scikit-learn's with C = 1 / (l2 T).
It is convex, so the answer hangs on features and `l2` alone, not on rates or a seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.errors import DataError

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # of l2; of equal ones the first, most regular, is taken
HELD_OUT = 0.2  # share of the training images that the strength is chosen on
MAX_ITERATIONS = 300


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """How well a linear layer names the classes."""

    accuracy: float  # share of the validation images, 0 to 1
    l2: float  # the strength that was chosen


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """A fitted classifier."""

    weights_cd: Tensor
    bias_c: Tensor

    def predict(self, x_Vd: Tensor) -> Tensor:
        """Classes of features: int64 [V]."""
        return (x_Vd.to(self.weights_cd) @ self.weights_cd.T + self.bias_c).argmax(dim=1)


def logistic_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    *,
    num_classes: int,
    generator: torch.Generator,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """Fit on features [T, d] and classes [T], judge on [V, d] and [V]; scales are those of the training set.

    `l2` is chosen on a random part of the training images (`generator`, on the CPU), never on the
    validation ones, and the layer is then fitted to all of the training images.

    Raises:
        DataError: too few images to hold some out, or none to classify.
    """
    num_held = int(HELD_OUT * len(train_x))
    if num_held == 0 or len(val_x) == 0:
        raise DataError(
            f"the linear probe wants at least {round(1 / HELD_OUT)} training images and 1 to classify, got"
            f" {len(train_x)} and {len(val_x)}; add images"
        )
    mean_d, scale_d = _scales(train_x)
    train_x, val_x = (train_x.double() - mean_d) / scale_d, (val_x.double() - mean_d) / scale_d
    order = torch.randperm(len(train_x), generator=generator).to(train_x.device)
    held, kept = order[:num_held], order[num_held:]

    def score(l2: float) -> float:
        layer = fit_logistic(train_x[kept], train_y[kept], num_classes=num_classes, l2=l2)
        return _accuracy(layer, train_x[held], train_y[held])

    chosen = max(strengths, key=score) if len(strengths) > 1 else strengths[0]
    layer = fit_logistic(train_x, train_y, num_classes=num_classes, l2=chosen)
    return LinearProbe(accuracy=_accuracy(layer, val_x, val_y), l2=chosen)


def fit_logistic(x_Td: Tensor, y_T: Tensor, *, num_classes: int, l2: float) -> LinearLayer:
    """The layer with the smallest loss, by L-BFGS in float64 from zero; features should be standardised."""
    x_Td, y_T = x_Td.double(), y_T.to(x_Td.device)
    weights_cd = x_Td.new_zeros(num_classes, x_Td.shape[1], requires_grad=True)
    bias_c = x_Td.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_cd, bias_c],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits_Tc = x_Td @ weights_cd.T + bias_c
        loss = F.cross_entropy(logits_Tc, y_T) + l2 / 2 * weights_cd.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearLayer(weights_cd=weights_cd.detach(), bias_c=bias_c.detach())


def _scales(x_Td: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature in float64; a constant feature keeps its scale."""
    deviation_d, mean_d = torch.std_mean(x_Td.double(), dim=0, correction=0)
    return mean_d, torch.where(deviation_d > 0, deviation_d, 1.0)


def _accuracy(layer: LinearLayer, x_Vd: Tensor, y_V: Tensor) -> float:
    return (layer.predict(x_Vd) == y_V.to(x_Vd.device)).double().mean().item()
