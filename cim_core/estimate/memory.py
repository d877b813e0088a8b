"""Memory of one worker: a training step on fake tensors, in the order of `cim_core.engine.step`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cim_core.config import TrainingConfig
from cim_core.data.dataset import Views
from cim_core.estimate.dry_run import MemoryMeter
from cim_core.optim import build_optimizer

_PASSES = 2  # of an accumulated step: a third forward pass would find what the second did


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes on one worker, without the process itself, its cache of pictures and its loaders."""

    model_bytes: int  # trained weights and buffers
    tokenizer_bytes: int  # frozen weights and buffers; 0 where the tokenizer is what is trained
    gradients_bytes: int  # twice the weights with several workers, which exchange them in buckets
    optimizer_bytes: int
    activations_bytes: int  # the most that one forward pass holds, its images included
    # Rank 0's copy for a checkpoint, on the host: beside the step where that is the device.
    snapshot_bytes: int
    peak_bytes: int  # the most that the device holds at any moment; not all of the above at once


class Output(Protocol):
    """What a forward pass returns; it lives until the next one has ended."""

    @property
    def loss(self) -> Tensor:
        """Scalar with gradient."""


Forward = Callable[[Views], Output]


def step_memory(
    model: nn.Module,
    forward: Forward,
    batch: Callable[[], Views],
    *,
    frozen: object,
    training: TrainingConfig,
    num_workers: int,
    on_gpu: bool,
    meter: MemoryMeter,
) -> MemoryCost:
    """The memory of steps of `model`; to be called inside the dry run that `meter` belongs to.

    Args:
        model: has fake weights, made inside that dry run as those of `frozen`, and nothing else was.
        forward: one pass.
        batch: makes this worker's part of a step.
        frozen: the tokenizer beside the model, or None.
        training: its precision is decided.
        num_workers: processes that train together.
        on_gpu: the step is there; snapshots lie in the host's memory.
        meter: of the surrounding dry run.
    """
    weights_bytes = meter.held_bytes
    gradients, passes_peak, activations_peak = _passes(
        model, forward, batch(), training=training, meter=meter
    )
    optimizer = build_optimizer(model, training)
    _update(optimizer, gradients, training)
    del gradients
    optimizer.zero_grad(set_to_none=True)
    optimizer_bytes = meter.held_bytes - weights_bytes
    # This first update made the optimizer's state, which from the second step on is there all the time.
    trained_bytes = sum(_size_bytes(p) for p in model.parameters() if p.requires_grad)
    buckets_bytes = trained_bytes if num_workers > 1 else 0
    peak_bytes = max(passes_peak + optimizer_bytes, meter.peak_bytes)
    snapshot_bytes = _saved_bytes(model) + optimizer_bytes
    if not on_gpu:
        beside = peak_bytes if training.async_checkpoints else weights_bytes + optimizer_bytes + trained_bytes
        peak_bytes = max(peak_bytes, beside + snapshot_bytes)
    return MemoryCost(
        model_bytes=tensor_bytes(model),
        tokenizer_bytes=tensor_bytes(frozen),
        gradients_bytes=trained_bytes + buckets_bytes,
        optimizer_bytes=optimizer_bytes,
        activations_bytes=activations_peak - weights_bytes,
        snapshot_bytes=snapshot_bytes,
        peak_bytes=peak_bytes + buckets_bytes,
    )


def tensor_bytes(module: object) -> int:
    """Parameters and buffers of a module, each once; 0 for what is no module."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(_size_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _saved_bytes(model: nn.Module) -> int:
    """What a checkpoint holds of the model: each tensor once."""
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(_size_bytes(tensor) for tensor in saved.values())


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _passes(
    model: nn.Module, forward: Forward, batch: Views, *, training: TrainingConfig, meter: MemoryMeter
) -> tuple[list[Tensor], int, int]:
    """The gradients of a step, and the most bytes held till then and in the first forward pass alone."""
    parts = batch.split(training.accumulation)
    activations_peak = 0
    for part in parts[:_PASSES]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16"):
            output = forward(part)
        activations_peak = activations_peak or meter.peak_bytes
        (output.loss / len(parts)).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return gradients, meter.peak_bytes, activations_peak


def _update(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], training: TrainingConfig) -> None:
    norm = torch.nn.utils.get_total_norm(gradients)
    if training.clip_norm > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, training.clip_norm, norm)
    optimizer.step()
