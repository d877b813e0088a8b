"""What makes the networks faster without changing what they compute, beyond rounding."""

import torch
from torch import nn

from cim_core.config import TrainingConfig
from cim_core.errors import ConfigError


def accelerate(model: nn.Module, training: TrainingConfig, device: torch.device) -> None:
    """Lay out and compile `model`, which is on `device`, in place; names in its state stay as they are.

    To be called before the optimizer is built: its moments have the layout of the weights.

    Raises:
        ConfigError: `training.compile` is asked for where torch cannot compile.
    """
    on_gpu = device.type == "cuda"
    if training.channels_last or (training.channels_last is None and on_gpu):
        model.to(memory_format=torch.channels_last)
    if training.compile:
        check_compiler(device)
        for part in (*_called_parts(model), *_frozen_parts(model)):
            part.compile()


def check_compiler(device: torch.device) -> None:
    """Compile one addition. Raises ConfigError, with torch's reason, where that fails."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # torch's own classes, and those of the tools behind it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        lesson = (
            f"torch.compile does not work here, got true: {reason}; set false, or give the worker a C++ "
            "compiler (CPU) or Triton (GPU) and a version of Python that torch can compile"
        )
        raise ConfigError([("training.compile", lesson)]) from error


def _called_parts(model: nn.Module) -> list[nn.Module]:
    """What a step calls as a whole: the model's parts, unless it says better."""
    said = getattr(model, "called_parts", None)
    return list(model.children()) if said is None else said()


def _frozen_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of a tokenizer beside the model, which is no child of it."""
    tokenizer = getattr(model, "frozen", None)
    return list(tokenizer.children()) if isinstance(tokenizer, nn.Module) else []
