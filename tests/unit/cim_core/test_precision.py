"""Number formats: decided once, by what the device has."""

from pathlib import Path

import pytest
import torch

from cim_core.config import TrainingConfig
from cim_core.engine import precision
from cim_core.engine.precision import best_precision, with_precision

CPU = torch.device("cpu")


def test_best_precision__a_cpu_without_bf16_arithmetic_keeps_fp32() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if {"avx512bw", "avx_ne_convert"} & set(flags):
        pytest.skip("this CPU has, or may emulate well, bf16 arithmetic")
    assert best_precision(CPU) == "fp32"


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_with_precision__what_was_asked_for_is_kept(given: precision.Precision) -> None:
    training = TrainingConfig(steps=1, precision=given)
    assert with_precision(training, CPU) is training


def test_with_precision__nothing_asked_for_is_decided_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "best_precision", lambda _: "bf16")
    assert with_precision(TrainingConfig(steps=1), CPU).precision == "bf16"
