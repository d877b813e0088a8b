"""Saving, loading, and what is wrong with a folder that does not load."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cim_core.config import TokenizerConfig
from cim_core.errors import ModelError
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.store import load_tokenizer, save_tokenizer

TINY = TokenizerConfig(image_size=16, stride=4, width=4, vocab_size=16, code_dim=8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(folder: Path, config: TokenizerConfig = TINY) -> DiscreteVAE:
    """A tokenizer after one training batch, in `folder`; in an order that safetensors does not take."""
    model = DiscreteVAE(config, generator=generator()).to(memory_format=torch.channels_last)
    model.train()(torch.rand(4, 3, 16, 16, generator=generator(1)), progress=0.0, generator=generator(2))
    save_tokenizer(model, folder)
    return model


@pytest.mark.parametrize("config", [TINY, replace(TINY, quantiser="relaxed")], ids=["vq", "relaxed"])
def test_round_trip__same_tokens_and_pictures(tmp_path: Path, config: TokenizerConfig) -> None:
    model = saved(tmp_path / "new" / "tokenizer", config)
    assert sorted(p.name for p in (tmp_path / "new" / "tokenizer").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    cells = torch.rand(3, 3, 4, 4, generator=generator(3)).round()  # the eight strongest colours
    images = cells.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    ids = loaded.encode(images)
    assert torch.equal(ids, model.encode(images))
    assert ids.min() < ids.max()
    assert torch.equal(loaded.decode(ids), model.decode(ids))


def test_load__is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    saved(tmp_path)
    before = torch.get_rng_state()
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, nn.Module)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.is_fake
    assert torch.equal(before, torch.get_rng_state())


def test_load__missing_folder_says_what_to_point_at(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"config\.json cannot be read.*`tokenizer` folder of a tokenizer job"
    ):
        load_tokenizer(tmp_path / "nowhere")


def test_load__missing_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_tokenizer(tmp_path)


def test_load__broken_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_tokenizer(tmp_path)


def test_load__weights_of_another_size(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, config={"vocab_size": 32})
    with pytest.raises(ModelError, match=r"do not fit config\.json.*codebook"):
        load_tokenizer(tmp_path)


def test_load__another_kind_of_artifact(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, kind="encoder")
    with pytest.raises(ModelError, match="does not say format 1 and kind 'dvae' or 'dall-e'"):
        load_tokenizer(tmp_path)


def test_load__no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": 1, "kind": "dall-e"}')
    with pytest.raises(ModelError, match="holds no configuration"):
        load_tokenizer(tmp_path)


def test_load__impossible_configuration(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, config={"stride": 3})
    with pytest.raises(ModelError, match="stride: must be 2, 4, 8 or 16, got 3"):
        load_tokenizer(tmp_path)


def test_load__keys_of_a_newer_release_are_dropped(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, config={"from_the_future": 1})
    assert load_tokenizer(tmp_path).vocab_size == 16


SMALL = DalleConfig(width=4, blocks_per_group=1, vocab_size=12, code_dim=6)
ORIGIN = {"encoder_sha256": "e" * 64, "decoder_sha256": "d" * 64}


def official(folder: Path) -> DalleTokenizer:
    """A tokenizer of the other kind with drawn weights, in `folder`."""
    model = DalleTokenizer(SMALL, origin=ORIGIN)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator(number)) / 3)
    save_tokenizer(model, folder)
    return model


def test_official__round_trip(tmp_path: Path) -> None:
    model = official(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, DalleTokenizer)
    assert (loaded.config, loaded.origin, loaded.vocab_size) == (SMALL, ORIGIN, 12)
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    images = torch.rand(3, 3, 32, 32, generator=generator(3)).round()
    ids = loaded.encode(images)
    assert torch.equal(ids, model.encode(images))
    assert ids.min() < ids.max()
    assert torch.equal(loaded.decode(ids), model.decode(ids))


def test_official__the_folder_names_the_files_it_came_from(tmp_path: Path) -> None:
    official(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["kind"] == "dall-e"
    assert {name: record[name] for name in ORIGIN} == ORIGIN


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vocab_size": 13}, r"do not fit config\.json.*table\.weight"),
        ({"width": 0}, "not valid: width must be at least 1, got 0"),
        ({"width": "wide"}, "not valid"),
    ],
)
def test_official__a_folder_that_does_not_fit(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    official(tmp_path)
    edit(tmp_path, config=changed, kind="dall-e")
    with pytest.raises(ModelError, match=words):
        load_tokenizer(tmp_path)


def edit(folder: Path, *, config: dict[str, object] | None = None, kind: str = "dvae") -> None:
    record = json.loads((folder / "config.json").read_text())
    record["kind"] = kind
    record["config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(record))
