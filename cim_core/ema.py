"""A running average of a network's weights, moved once after each optimizer step."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class RunningAverage(AveragedModel):
    """`decay * average + (1 - decay) * weights` of each parameter of `source`; buffers are its latest.

    The average begins with the weights after the first step. It is frozen, so it gets no gradient and
    no weight decay, and the optimizer does not know it. Where it is a part of the trained model its
    tensors (`module.NAME`, `n_averaged`) are saved and restored with that model's.
    """

    def __init__(self, source: nn.Module, *, decay: float) -> None:
        super().__init__(source)
        self.decay = decay
        self.requires_grad_(requires_grad=False)
        self._source = (source,)  # in a tuple, where nn.Module does not register it a second time

    @torch.no_grad()
    def update(self, *, unless: Tensor | None = None) -> None:
        """Move the average towards the source's weights, but not where `unless`, 0 or 1, is 1.

        As `update_parameters`, which asks the device whether this is the first time and so waits for it.
        """
        source = self._source[0]
        moves = torch.ones_like(self.n_averaged) if unless is None else 1 - unless
        share = moves * (self.n_averaged == 0).float().clamp(min=1 - self.decay)
        for average, weight in zip(self.module.parameters(), source.parameters(), strict=True):
            average.lerp_(weight, share.to(average.dtype))
        for copy, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            copy.copy_(buffer)
        self.n_averaged += moves.to(self.n_averaged.dtype)


def update_averages(model: nn.Module, *, unless: Tensor | None = None) -> None:
    """Move every running average inside `model`, as `RunningAverage.update`; called after each step."""
    for part in model.modules():
        if isinstance(part, RunningAverage):
            part.update(unless=unless)
