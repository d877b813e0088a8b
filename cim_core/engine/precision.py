"""Which number format a device computes fast in."""

import dataclasses
from typing import Literal

import torch

from cim_core.config import TrainingConfig

Precision = Literal["fp32", "bf16"]


def best_precision(device: torch.device) -> Precision:
    """bf16 where the device computes it, else fp32.

    A CPU without bf16 arithmetic emulates it: measured 11 times slower than fp32 on one with AVX2 alone
    (docs/lab-log.md, 2026-11-23).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def with_precision(training: TrainingConfig, device: torch.device) -> TrainingConfig:
    """`training` with its precision decided: as given, or the best that `device` has."""
    if training.precision is not None:
        return training
    return dataclasses.replace(training, precision=best_precision(device))
