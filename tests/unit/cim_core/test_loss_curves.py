"""The losses of fixed short trainings: a refactoring leaves them bit for bit as they are."""

import json

import pytest

from tests.unit.cim_core.loss_curves import CURVES, FILE, STEPS, curve, machine

# Relative, of a loss or share and of the gradient's norm. Other processors round otherwise, which may tip a
# drawn token. Other releases of torch draw other truncated normals (2.11 and 2.15): weights start elsewhere.
OTHER_PROCESSOR, OTHER_TORCH = (0.02, 0.2), (0.1, 0.5)


@pytest.mark.parametrize(("family", "name"), CURVES, ids="-".join)
def test_curve__is_the_golden_one(family: str, name: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    expected, got = golden["curves"][f"{family} {name}"], curve(family, name)
    assert len(expected) == STEPS
    if golden["machine"] == machine():
        assert got == expected, "python -m tests.unit.cim_core.loss_curves, if that was meant"
        return
    same_torch = golden["machine"]["torch"] == machine()["torch"]
    of_loss, of_norm = OTHER_PROCESSOR if same_torch else OTHER_TORCH
    for point, target in zip(got, expected, strict=True):
        assert point.keys() == target.keys()
        for metric, value in target.items():
            tolerance = of_norm if metric == "grad_norm" else of_loss
            assert point[metric] == pytest.approx(value, rel=tolerance), metric
