"""What makes the networks faster without changing what they compute, beyond rounding."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
        lesson = (
            f"torch.compile does not work here, got true: {_first_line(error)}; set false, or give the "
            "worker a C++ compiler (CPU) or Triton (GPU) and a version of Python that torch can compile"
        )
        raise ConfigError([("training.compile", lesson)]) from error


@contextmanager
def explained_compiling() -> Iterator[None]:
    """Networks compile when they are first called: there, turn an error of torch's compiler into a lesson.

    Raises:
        ConfigError: from the compiler's error; what else is raised passes through.
    """
    try:
        yield
    except Exception as error:
        if not _is_compilers(error):
            raise
        cause = getattr(error, "inner_exception", error)
        lesson = (
            f"torch cannot compile a network of this run, got true: {type(cause).__name__}: "
            f"{_first_line(cause)}; set training.compile: false"
        )
        raise ConfigError([("training.compile", lesson)]) from error


def _is_compilers(error: Exception) -> bool:
    """Of the class above those of inductor and of other backends; importing it takes a second."""
    compiler = sys.modules.get("torch._dynamo.exc")
    return compiler is not None and isinstance(error, compiler.TorchDynamoException)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _called_parts(model: nn.Module) -> list[nn.Module]:
    """What a step calls as a whole: the model's parts, unless it says better."""
    said = getattr(model, "called_parts", None)
    return list(model.children()) if said is None else said()


def _frozen_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of a tokenizer beside the model, which is no child of it."""
    tokenizer = getattr(model, "frozen", None)
    return list(tokenizer.children()) if isinstance(tokenizer, nn.Module) else []
