"""OpenAI's files, read as data, against the official modules themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cim_core.errors import ModelError
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer, dalle_on_meta
from cim_core.tokenizers.official import read_official, sha256_of
from tests.unit.cim_core.official_files import (
    BLOCKS,
    CODE,
    VOCAB,
    WIDTH,
    dall_e,
    official_decoder,
    official_encoder,
    write_official,
)


def images(*size: int) -> Tensor:
    """Flat cells of strong colours."""
    cells = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1)).round()
    return cells.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def one_hot(ids_Bhw: Tensor) -> Tensor:
    return F.one_hot(ids_Bhw, VOCAB).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_official__same_tokens_and_pictures_as_the_official_modules(tmp_path: Path, *, zipped: bool) -> None:
    encoder, decoder = official_encoder(), official_decoder()
    ours = read_official(*write_official(tmp_path, encoder=encoder, decoder=decoder, zipped=zipped))
    pictures = images(4, 5)
    expected = encoder(dall_e.map_pixels(pictures)).argmax(dim=1)
    ids = ours.encode(pictures)
    assert torch.equal(ids, expected)
    assert ids.dtype == torch.int64
    assert len(set(ids.flatten().tolist())) >= 5
    painted = dall_e.unmap_pixels(decoder(one_hot(expected))[:, :3].sigmoid())
    torch.testing.assert_close(ours.decode(ids), painted, rtol=0, atol=1e-5)
    assert painted.std() > 0.05
    assert painted.min() == 0  # so the clamp had something to do


def test_table__is_the_one_hot_convolution(tmp_path: Path) -> None:
    decoder = official_decoder()
    ours = read_official(*write_official(tmp_path, decoder=decoder))
    ids = torch.randint(VOCAB, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours.table(ids), decoder.blocks.input(one_hot(ids)), rtol=0, atol=0)


def test_official__is_frozen_sized_as_saved_and_knows_its_files(tmp_path: Path) -> None:
    encoder, decoder = write_official(tmp_path)
    before = torch.get_rng_state()
    ours = read_official(encoder, decoder)
    assert torch.equal(before, torch.get_rng_state())
    assert ours.config == DalleConfig(width=WIDTH, blocks_per_group=BLOCKS, vocab_size=VOCAB, code_dim=CODE)
    assert not ours.training
    assert not ours.is_fake
    assert not any(p.requires_grad or p.is_meta for p in ours.parameters())
    assert ours.origin == {"encoder_sha256": sha256_of(encoder), "decoder_sha256": sha256_of(decoder)}


def test_official__sizes_by_default() -> None:
    """Counts from METHOD section 8.2, which were computed from the published code."""
    model = dalle_on_meta(DalleConfig(), origin={})
    assert all(p.is_meta for p in model.parameters())
    assert _count(model.encoder) == 53_786_240
    assert _count(model.table) + _count(model.decoder) == 43_829_766
    assert (model.vocab_size, model.stride) == (8192, 8)


def test_official__sizes_and_names_are_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        monkeypatch.setattr(Tensor, "normal_", lambda self, **_: self)
        parts = [dall_e.Encoder(device="meta"), dall_e.Decoder(device="meta")]
    ours = dalle_on_meta(DalleConfig(), origin={})
    theirs = {name for part in parts for name, _ in part.named_parameters() if "input" not in name}
    names = {
        name.removeprefix(half).replace("weight", "w").replace("bias", "b")
        for half in ("encoder.", "decoder.")
        for name, _ in ours.named_parameters()
        if name.startswith(half) and "input" not in name
    }
    assert names == theirs
    assert [_count(part) for part in parts] == [53_786_240, 43_829_766]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_encode__refuses_pictures_that_do_not_fit(tmp_path: Path) -> None:
    ours = read_official(*write_official(tmp_path))
    with pytest.raises(ValueError, match="multiples of the tokenizer's stride 8, got 12 x 16"):
        ours.encode(torch.rand(1, 3, 12, 16))


def test_encode__vocabulary_layer_stays_float32_under_autocast(tmp_path: Path) -> None:
    ours = read_official(*write_official(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.encoder(torch.rand(1, 3, 16, 16)).dtype == torch.float32
        assert ours.table(torch.zeros(1, 2, 2, dtype=torch.int64)).dtype == torch.float32
        assert ours.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).dtype == torch.float32


def _without(name: str) -> Any:
    encoder = official_encoder()
    del encoder.blocks.group_2.block_1.res_path._modules[name]
    return encoder


def _with_shape(shape: tuple[int, ...]) -> Any:
    encoder = official_encoder()
    encoder.blocks.input.b = nn.Parameter(torch.zeros(shape), requires_grad=False)
    return encoder


def _with(**attributes: Any) -> Any:
    encoder = official_encoder()
    for name, value in attributes.items():
        setattr(encoder, name, value)
    return encoder


def _not_finite() -> Any:
    encoder = official_encoder()
    encoder.blocks.input.w.data[0, 0, 0, 0] = float("nan")
    return encoder


def _half() -> Any:
    return official_encoder().half()


def _with_layers(table: object) -> Any:
    encoder = official_encoder()
    encoder.__dict__ |= {"_modules": table, "kept": encoder._modules}  # so that the file stays as large
    return encoder


def _loaded_relu() -> Any:
    encoder = official_encoder()
    encoder.blocks.output.relu.slope = nn.Parameter(torch.ones(1))
    return encoder


def _endless() -> Any:
    encoder = official_encoder()
    encoder.blocks.group_1.block_1 = encoder.blocks
    return encoder


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda: _without("conv_2"), r"layers of blocks\.group_2\.block_1\.res_path\. .* lacks 'conv_2'"),
        (lambda: _with(extra=dall_e.utils.Conv2d(1, 1, 1)), "has 'extra' besides"),
        (lambda: _with(n_hid=1 << 40), "n_hid must be 1 to 4096, got 1099511627776"),
        (lambda: _with(n_hid="16"), "n_hid must be 1 to 4096, got '16'"),
        (lambda: _with(vocab_size=0), "vocab_size must be 1 to 131072, got 0"),
        (lambda: _with(n_hid=4096), r"its sizes need \d+ bytes of weights, and the file has \d+"),
        (
            lambda: _with(vocab_size=47),
            r"blocks\.output\.conv\.w: it has the shape \[48, 128, 1, 1\], not \[47",
        ),
        (lambda: _with_shape((WIDTH - 1,)), r"blocks\.input\.b: it has the shape \[15\], not \[16\]"),
        (lambda: _with_shape((WIDTH, 1)), r"blocks\.input\.b: it has the shape \[16, 1\], not \[16\]"),
        (_not_finite, r"blocks\.input\.w: some of its numbers are not finite"),
        (_half, r"names 'torch\.HalfStorage'"),
        (lambda: _with_layers([1]), "_modules is no table but list"),
        (lambda: _with_layers({"blocks": 7}), r"blocks\. is no module but 7"),
        (_loaded_relu, r"layers of blocks\.output\. .* has 'relu' besides"),
        (_endless, r"the layers of blocks\.group_1\.block_1\. are not the expected ones"),
        (official_decoder, r"it holds a dall_e\.decoder\.Decoder where a dall_e\.encoder\.Encoder must be"),
        (lambda: nn.Linear(2, 2), r"names 'torch\.nn\.modules\.linear\.Linear'"),
        (lambda: {"blocks.input.w": torch.zeros(1)}, r"it holds a dict where"),
        (lambda: [1, 2], r"it holds a list where"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_official__what_is_not_the_official_module_is_refused(
    tmp_path: Path, encoder: Any, words: str, *, zipped: bool
) -> None:
    paths = write_official(tmp_path, encoder=encoder(), zipped=zipped)
    with pytest.raises(ModelError, match=f"encoder.pkl is not one of OpenAI's two files: .*{words}"):
        read_official(*paths)


def test_official__files_of_two_models_do_not_mix(tmp_path: Path) -> None:
    paths = write_official(tmp_path, decoder=official_decoder(n_hid=24))
    with pytest.raises(ModelError, match=r"do not belong together.*width=16.*width=24"):
        read_official(*paths)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_official__a_truncated_file_is_refused(tmp_path: Path, share: float, *, zipped: bool) -> None:
    encoder, decoder = write_official(tmp_path, zipped=zipped)
    whole = decoder.read_bytes()
    decoder.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"decoder.pkl is not one of OpenAI's two files"):
        read_official(encoder, decoder)


def test_official__a_flipped_bit_in_the_archive_is_seen(tmp_path: Path) -> None:
    encoder, decoder = write_official(tmp_path)
    content = bytearray(encoder.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a large convolution
    encoder.write_bytes(content)
    with pytest.raises(ModelError, match=r"cut off or damaged.*CRC"):
        read_official(encoder, decoder)


def test_tokenizer__weights_are_those_of_the_file_alone(tmp_path: Path) -> None:
    """A second reading shares no memory with the first."""
    paths = write_official(tmp_path)
    first, second = read_official(*paths), read_official(*paths)
    before = second.table.weight.clone()
    first.table.weight.zero_()
    assert torch.equal(second.table.weight, before)
    assert isinstance(first, DalleTokenizer)
