"""Number formats: decided once, by what the device has."""

import pytest
import torch

from cim_core.config import TrainingConfig
from cim_core.engine import precision
from cim_core.engine.precision import best_precision, with_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_best_precision__a_cpu_with_bf16_arithmetic_uses_it(flag: str) -> None:
    with open("/proc/cpuinfo") as info:
        flags = next(line for line in info if line.startswith("flags")).split()
    if flag in flags:
        assert best_precision(CPU) == "bf16"
    elif not {"avx512_bf16", "amx_bf16", "avx512bw", "avx_ne_convert"} & set(flags):
        assert best_precision(CPU) == "fp32"


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_with_precision__what_was_asked_for_is_kept(given: precision.Precision) -> None:
    training = TrainingConfig(steps=1, precision=given)
    assert with_precision(training, CPU) is training


def test_with_precision__nothing_asked_for_is_decided_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "best_precision", lambda _: "bf16")
    assert with_precision(TrainingConfig(steps=1), CPU).precision == "bf16"
