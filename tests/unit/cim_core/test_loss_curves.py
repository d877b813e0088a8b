"""The losses of fixed short trainings: a refactoring leaves them bit for bit as they are."""

import json

import pytest

from tests.unit.cim_core.loss_curves import CURVES, FILE, STEPS, curve, machine

OTHER_MACHINE = 2e-3  # relative; rounding differs between processors and grows from step to step


@pytest.mark.parametrize(("family", "name"), CURVES, ids="-".join)
def test_curve__is_the_golden_one(family: str, name: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    expected, got = golden["curves"][f"{family} {name}"], curve(family, name)
    assert len(expected) == STEPS
    if golden["machine"] == machine():
        assert got == expected, "python -m tests.unit.cim_core.loss_curves, if that was meant"
        return
    for point, target in zip(got, expected, strict=True):
        assert point == pytest.approx(target, rel=OTHER_MACHINE)
