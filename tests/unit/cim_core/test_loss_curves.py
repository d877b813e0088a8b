"""The losses of fixed short trainings: a refactoring leaves them bit for bit as they are."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest

from cim_core import optim
from cim_core.objectives.respix import WindowStatistics
from tests.unit.cim_core.loss_curves import CURVES, STEPS, Curve, curve, departures, machine, recorded

SETS = recorded()
AVX2, AVX512 = ({"torch": "2.15.0", "cpu": f"a processor, {vectors}"} for vectors in ("AVX2", "AVX512"))
NONE = {"torch": "2.15.0", "cpu": "a processor, DEFAULT"}


@cache
def computed(family: str, name: str) -> Curve:
    return curve(family, name)


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden["machine"]["cpu"])
@pytest.mark.parametrize(("family", "name"), CURVES, ids=["-".join(names) for names in CURVES])
def test_curve__is_the_golden_one(family: str, name: str, golden: dict[str, dict[str, Curve]]) -> None:
    """Bit for bit that of this machine, and but for rounding those of the others."""
    expected = golden["curves"][f"{family} {name}"]
    assert len(expected) == STEPS
    found = departures(computed(family, name), expected, here=machine(), there=golden["machine"])  # type: ignore[arg-type]
    assert found == [], "python -m tests.unit.cim_core.loss_curves, if that was meant"


def wide_variance_floor(patch: pytest.MonkeyPatch) -> None:
    real = WindowStatistics.__init__
    patch.setattr(WindowStatistics, "__init__", lambda self, window: real(self, window, eps=1e-5))


def decay_for_positions_and_class_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optim, "NO_DECAY_NAMES", ())


@pytest.mark.parametrize(
    ("plant", "family", "name"),
    [
        (wide_variance_floor, "vit", "respix"),
        (wide_variance_floor, "cnn", "respix"),
        (decay_for_positions_and_class_token, "vit", "respix"),
        (decay_for_positions_and_class_token, "cnn", "revdet"),
        (decay_for_positions_and_class_token, "peer", "beit"),
    ],
)
def test_other_machine__a_small_fault_is_no_rounding(
    plant: Callable[[pytest.MonkeyPatch], None], family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = computed(family, name)
    plant(monkeypatch)
    faulty = curve(family, name)
    assert departures(clean, clean, here=AVX512, there=AVX2) == []
    assert departures(faulty, clean, here=AVX512, there=AVX2) != []


SMOOTH: Curve = [{"loss": 2.0, "grad_norm": 5.0, "replaced_share": 0.5} for _ in range(4)]


def changed(step: int, **values: float) -> Curve:
    points = deepcopy(SMOOTH)
    points[step] |= values
    return points


def test_departures__of_the_same_machine_is_every_bit() -> None:
    found = departures(changed(1, loss=2.0000002), SMOOTH, here=AVX2, there=AVX2)
    assert found == ["step 2: loss is 2.0000002, not 2.0"]


@pytest.mark.parametrize(
    ("values", "red"),
    [
        ({"loss": 2.0 + 1e-6}, False),
        ({"loss": 2.0 + 1e-5}, True),
        ({"grad_norm": 5.0 + 8e-6}, False),
        ({"grad_norm": 5.0 + 2e-5}, True),
        ({"loss": float("nan")}, True),
        ({"loss": 2.01, "replaced_share": 0.5 + 1 / 256}, False),
        ({"loss": 2.1, "replaced_share": 0.5 + 1 / 256}, True),
        ({"replaced_share": 0.5 + 3 / 256}, True),
    ],
)
def test_departures__of_another_machine(values: dict[str, float], red: bool) -> None:  # noqa: FBT001
    assert bool(departures(changed(2, **values), SMOOTH, here=AVX512, there=AVX2)) == red


def test_departures__a_tipped_token_excuses_nothing_before_it() -> None:
    tipped = changed(2, replaced_share=0.5 + 1 / 256)
    tipped[3]["loss"] = 2.01
    assert departures(tipped, SMOOTH, here=AVX512, there=AVX2) == []
    tipped[1]["loss"] = 2.01
    assert departures(tipped, SMOOTH, here=AVX512, there=AVX2) == ["step 2: loss is 2.01, not 2.0"]


def test_departures__without_vector_instructions_sums_are_in_another_order() -> None:
    other = changed(2, loss=2.0 + 1e-5)
    assert departures(other, SMOOTH, here=NONE, there=AVX2) == []
    assert departures(other, SMOOTH, here=AVX512, there=AVX2) != []


def test_departures__another_torch_draws_other_weights() -> None:
    other = changed(0, loss=2.1)
    assert departures(other, SMOOTH, here=AVX2 | {"torch": "2.11.0"}, there=AVX2) == []
