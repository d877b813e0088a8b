"""Gradient checkpointing: less memory, because activations are computed again in the backward pass.

timm decides which parts of a network are computed twice. Dropout is the same both times (torch puts the
generators back), but a batch norm layer would also count its batch twice into its running statistics,
which are exported with the weights; here the second pass leaves them alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def can_checkpoint(backbone: nn.Module) -> bool:
    """Whether timm has gradient checkpointing for this network."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # how timm says that there is none
        return False
    backbone.set_grad_checkpointing(False)  # type: ignore[operator]
    return True


class Recomputation:
    """Gradient checkpointing of one network, which has to be called inside `first_pass`."""

    def __init__(self, backbone: nn.Module) -> None:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        self._in_first_pass = False
        self._kept: dict[nn.Module, dict[str, Tensor]] = {}
        for layer in backbone.modules():
            if isinstance(layer, _BatchNorm):
                layer.register_forward_pre_hook(self._hide)
                # torch ends the second pass with an exception once it has what it wants.
                layer.register_forward_hook(self._put_back, always_call=True)

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """What is called inside counts into running statistics; what torch calls later does not."""
        self._in_first_pass = True
        try:
            yield
        finally:
            self._in_first_pass = False

    def _hide(self, layer: nn.Module, _: object) -> None:
        """Give the layer copies of its statistics to write on."""
        if not self._in_first_pass and layer.training:
            self._kept[layer] = dict(layer.named_buffers(recurse=False))
            for name, statistic in self._kept[layer].items():
                setattr(layer, name, statistic.clone())

    def _put_back(self, layer: nn.Module, *_: object) -> None:
        """Give the layer its own statistics again."""
        for name, statistic in self._kept.pop(layer, {}).items():
            setattr(layer, name, statistic)
