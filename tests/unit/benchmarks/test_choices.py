"""The benchmark of the open choices: each variant is a configuration, and differs from the default."""

from argparse import Namespace

import pytest

from benchmarks.changes import changed
from benchmarks.choices import UNTRAINED, VARIANTS, Both, Setup, setup_of
from cim_core.config import TokenizerConfig
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.store import save_tokenizer
from tests.unit.cim_core.tiny import write_images


@pytest.fixture(scope="module", params=[(32, 4), (64, 8)], ids=["as decoded", "enlarged"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    size, patch = request.param
    folder = tmp_path_factory.mktemp("choices")
    config = TokenizerConfig(image_size=32, stride=4, width=4, vocab_size=16, code_dim=4)
    save_tokenizer(DiscreteVAE(config, generator=generator_for(0, "init", "tokenizer")), folder / "tokenizer")
    images = write_images(folder / "images", count=4, side=40)
    data = {"images": images, "train": images, "val": images, "most": 4, "tokenizer": folder / "tokenizer"}
    training = {"steps": 2, "batch": 2, "rate": 1e-3, "precision": "fp32"}
    return setup_of(Namespace(**data, **training, size=size, patch=patch))


def test_variants__are_valid_and_differ_from_the_default(setup: Setup) -> None:
    default = Both(model=setup.model, training=setup.training)
    for name, changes in setup.variants().items():
        both = changed(default, changes)  # raises where it is no configuration
        assert (both == default) == (name in (UNTRAINED, "default")), name


def test_variants__enlarging_asks_for_a_picture_to_enlarge(setup: Setup) -> None:
    enlarged = setup.model.image_size == 64
    assert ("interpolation bilinear" in setup.variants()) == enlarged
    assert ("not enlarged, 32 px" in setup.variants()) == enlarged
    assert len(setup.variants()) == len(VARIANTS) + (1 if enlarged else -1)
