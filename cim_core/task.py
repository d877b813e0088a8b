"""Pre-training as the engine sees it: a batch in, losses out, every random choice named by its place.

Shape letters in this file:
    B  images of one microbatch on this rank
"""

from torch import nn

from cim_core.data.dataset import Views
from cim_core.pretraining import Output, Pretraining
from cim_core.seeding import generator_for


class CimTask:
    """Loss of CIM or a peer on one microbatch; `module` may be the model or a wrapper around it."""

    def __init__(self, module: nn.Module, *, seed: int) -> None:
        self.module = module
        self.seed = seed

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        """Masks and samples depend on (seed, step, micro, rank) alone, so a resumed run draws the same."""
        del progress
        generator = generator_for(self.seed, "cim", step, rank, micro)
        output: Output = self.module(batch, generator=generator)
        return output


def cim_task(model: Pretraining | nn.Module, *, seed: int) -> CimTask:
    """The task of pre-training `model`, CIM or a peer, which may be wrapped by DistributedDataParallel."""
    return CimTask(model, seed=seed)
