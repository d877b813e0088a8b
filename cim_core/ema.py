"""A running average of a network's weights, moved once after each optimizer step."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class RunningAverage(AveragedModel):
    """`decay * average + (1 - decay) * weights` of each parameter of `source`; buffers are its latest.

    The average begins with the weights after the first step. It is frozen, so it gets no gradient and
    no weight decay, and the optimizer does not know it. Where it is a part of the trained model its
    tensors (`module.NAME`, `n_averaged`) are saved and restored with that model's.
    """

    def __init__(self, source: nn.Module, *, decay: float) -> None:
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(source, multi_avg_fn=mean)
        self.requires_grad_(requires_grad=False)
        self._source = (source,)  # in a tuple, where nn.Module does not register it a second time

    def update(self) -> None:
        """Move the average towards the source's weights."""
        self.update_parameters(self._source[0])


def update_averages(model: nn.Module) -> None:
    """Move every running average inside `model`; called after each optimizer step."""
    for part in model.modules():
        if isinstance(part, RunningAverage):
            part.update()
