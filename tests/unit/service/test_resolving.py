"""Every open default is filled once, in the way that cim_core/config.py says."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.contracts.parsing import parse
from service.contracts.resolving import resolve
from service.errors import InvalidSpecError
from tests.unit.service.test_parsing import evaluate, peer, pretrain


def resolved(**changes: Any) -> dict[str, Any]:
    return resolve(parse(pretrain(**changes)))


def test_resolve__a_plain_vit_shares_two_blocks() -> None:
    model = resolved()["model"]
    assert model["enhancer"]["shared_blocks"] == 2
    assert (model["generator"]["width"], model["generator"]["heads"]) == (192, 3)
    assert model["objective"]["weight"] == 10.0


def test_resolve__a_cnn_shares_nothing() -> None:
    model = resolved(model__enhancer__name="resnet18", model__objective__name="revdet")["model"]
    assert model["enhancer"]["shared_blocks"] == 0
    assert (model["generator"]["width"], model["generator"]["heads"]) == (384, 6)
    assert model["objective"]["weight"] == 1.0


def test_resolve__what_was_given_stays() -> None:
    model = resolved(
        model__enhancer__shared_blocks=0, model__generator={"width": 200}, model__objective__weight=3.0
    )["model"]
    assert (model["generator"]["width"], model["generator"]["heads"]) == (200, 2)  # 200 / 64 = 3 divides not
    assert model["objective"]["weight"] == 3.0


def test_resolve__nothing_is_shared_with_a_generator_of_another_width() -> None:
    assert resolved(model__generator={"width": 100})["model"]["enhancer"]["shared_blocks"] == 0


def test_resolve__shares_nothing_with_relative_positions() -> None:
    model = resolved(model__generator={"positions": "relative"})["model"]
    assert model["enhancer"]["shared_blocks"] == 0
    assert (model["generator"]["width"], model["generator"]["heads"]) == (192, 3)


def test_resolve__no_more_is_shared_than_there_is() -> None:
    assert resolved(model__generator={"depth": 1})["model"]["enhancer"]["shared_blocks"] == 1


def test_resolve__options_of_the_enhancer_count() -> None:
    options = {"embed_dim": 96, "num_heads": 4, "depth": 1}
    model = resolved(model__enhancer__options=options)["model"]
    assert (model["generator"]["width"], model["generator"]["heads"]) == (96, 4)
    assert model["enhancer"]["shared_blocks"] == 1


@pytest.mark.parametrize(
    ("method", "masking", "more"),
    [
        ("beit", {"strategy": "block", "min_ratio": 0.383, "max_ratio": 0.383}, {"tokenizer"}),
        ("simmim", {"strategy": "random", "min_ratio": 0.6, "max_ratio": 0.6, "unit": 32}, set()),
        ("mae", {"strategy": "random", "min_ratio": 0.75, "max_ratio": 0.75}, {"decoder"}),
    ],
)
def test_resolve__a_peer_gets_its_masks_and_nothing_of_cim(
    method: str, masking: dict[str, Any], more: set[str]
) -> None:
    document = resolve(parse(peer(method)))
    model = document["model"]
    assert model["masking"] == {**masking, "block_min_cells": 16}
    assert set(model) == {"method", "enhancer", "image_size", "patch_size", "masking", *more}
    assert "shared_blocks" not in model["enhancer"]
    if method == "mae":
        assert model["decoder"] == {"depth": 8, "width": 512, "heads": 16}
    assert resolve(parse(document)) == document


def test_resolve__cim_has_its_masks_written_out() -> None:
    model = resolved()["model"]
    expected = {"strategy": "random", "min_ratio": 0.51, "max_ratio": 0.61, "block_min_cells": 16}
    assert (model["method"], model["interpolation"], model["masking"]) == ("cim", "bicubic", expected)
    assert model["generator"]["depth"] == 4


@pytest.mark.parametrize(
    ("length", "warmup", "sample"),
    [
        ({"epochs": 300}, {"epochs": 10.0}, {"epochs": 30.0}),
        ({"steps": 600}, {"steps": 20}, {"steps": 60}),
        ({"steps": 3}, {"steps": 1}, {"steps": 1}),
        ({"images": 90_000}, {"images": 3000}, {"images": 9000}),
    ],
)
def test_resolve__lengths_are_parts_of_the_training(
    length: dict[str, int], warmup: dict[str, int], sample: dict[str, int]
) -> None:
    training = resolved(training=length)["training"]
    assert (training["warmup"], training["sample_every"]) == (warmup, sample)
    assert training["checkpoint_every"] == {"epochs": 1.0}


def test_resolve__evaluate_has_its_tasks_written_out() -> None:
    assert resolve(parse(evaluate(tasks=["knn"])))["tasks"] == [{"name": "knn", "k": 20, "temperature": 0.07}]


lengths = st.one_of(
    st.fixed_dictionaries({"epochs": st.floats(0.01, 1e4)}),
    st.fixed_dictionaries({"steps": st.integers(1, 10**7)}),
    st.fixed_dictionaries({"images": st.integers(1, 10**9)}),
)
generators = st.fixed_dictionaries(
    {}, optional={"depth": st.integers(1, 8), "width": st.integers(1, 999), "heads": st.integers(1, 12)}
)
enhancers = st.fixed_dictionaries(
    {"name": st.sampled_from(["vit_tiny_patch16_224", "vit_small_patch16_224", "resnet18"])},
    optional={
        "shared_blocks": st.integers(0, 4),
        "options": st.sampled_from([{"depth": 2}, {"embed_dim": 64}]),
    },
)


@settings(suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
@given(training=lengths, generator=generators, enhancer=enhancers, name=st.sampled_from(["respix", "revdet"]))
def test_resolve__twice_changes_nothing_and_leaves_nothing_open(
    training: Any, generator: Any, enhancer: Any, name: str
) -> None:
    spec = pretrain(
        training=training, model__generator=generator, model__enhancer=enhancer, model__objective__name=name
    )
    try:
        once = resolve(parse(spec))
    except InvalidSpecError:
        return  # refused, so there is nothing to resolve
    assert resolve(parse(once)) == once
    assert {"shared_blocks"} <= set(once["model"]["enhancer"])
    assert {"width", "heads", "depth"} <= set(once["model"]["generator"])
    assert {"warmup", "checkpoint_every", "sample_every"} <= set(once["training"])
    assert once["model"]["generator"]["width"] % once["model"]["generator"]["heads"] == 0
