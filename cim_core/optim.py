"""AdamW with the parameter groups of BEiT (METHOD.md sections 3 and 7.3)."""

from typing import Any

import torch
from torch import nn

from cim_core.config import TrainingConfig

NO_DECAY_NAMES = ("pos_embed", "cls_token")


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over every parameter of `model` that wants a gradient; learning rate 0 until the loop sets it.

    Fused it is one kernel, which also can skip a step by a flag on the device (cim_core/engine/step.py).
    Its rounding differs in the last bit.
    """
    groups = parameter_groups(model, weight_decay=training.weight_decay)
    fused = training.fused_optimizer
    if fused is None:
        fused = all(p.is_cuda for group in groups for p in group["params"])
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused or None)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with decay, and without (1-D tensors, biases, `pos_embed`, `cls_token`).

    A parameter with two names appears once. An empty group is left out.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = [p for name, p in trained if not decays(name, p)]
    decayed = [p for name, p in trained if decays(name, p)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies. Mask tokens and relative-bias tables decay, as in BEiT's code."""
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and last != "bias" and last not in NO_DECAY_NAMES
