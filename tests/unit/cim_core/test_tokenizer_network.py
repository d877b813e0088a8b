"""Shapes, layout and arithmetic of encoder and decoder."""

import pytest
import torch

from cim_core.tokenizers.network import (
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    Layout,
    initialise,
    map_pixels,
    unmap_pixels,
)


def layout(*, stride: int = 8, width: int = 8, blocks_per_group: int = 1) -> Layout:
    return Layout(width=width, stride=stride, blocks_per_group=blocks_per_group)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_network__stride_and_back(stride: int) -> None:
    encoder = Encoder(layout(stride=stride, width=4), num_outputs=5)
    decoder = Decoder(layout(stride=stride, width=4), code_dim=5)
    initialise(encoder, generator=generator())
    initialise(decoder, generator=generator())
    z = encoder(torch.rand(2, 3, 2 * stride, 3 * stride))
    assert z.shape == (2, 5, 2, 3)
    assert decoder(z).shape == (2, 3, 2 * stride, 3 * stride)


def test_network__official_widths_have_the_official_number_of_parameters() -> None:
    """Counts from METHOD section 8.2, which were computed from the published code."""
    official = Layout(width=256, stride=8, blocks_per_group=2)
    encoder = Encoder(official, num_outputs=8192)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    decoder = Decoder(official, code_dim=128, num_colours=6)
    look_up = 8192 * 128 + 128  # the decoder's first layer, which belongs to the quantiser here
    assert sum(p.numel() for p in decoder.parameters()) + look_up == 43_829_766


def test_network__official_names() -> None:
    encoder = Encoder(layout(blocks_per_group=2), num_outputs=16)
    names = set(encoder.state_dict())
    expected = {
        "blocks.input.weight",
        "blocks.group_1.block_1.res_path.conv_1.weight",
        "blocks.group_2.block_1.id_path.weight",
        "blocks.group_4.block_2.res_path.conv_4.bias",
        "blocks.output.conv.weight",
    }
    assert expected <= names
    assert "blocks.group_1.block_1.id_path.weight" not in names  # widths are equal there


def test_block__is_the_sum_written_out() -> None:
    block = EncoderBlock(4, 8, post_gain=0.25)
    initialise(block, generator=generator())
    weights = block.state_dict()
    x = torch.randn(1, 4, 5, 5, generator=generator(1))
    hidden = x
    for i, padding in ((1, 1), (2, 1), (3, 1), (4, 0)):
        hidden = torch.conv2d(
            hidden.relu(),
            weights[f"res_path.conv_{i}.weight"],
            weights[f"res_path.conv_{i}.bias"],
            padding=padding,
        )
    skip = torch.conv2d(x, weights["id_path.weight"], weights["id_path.bias"])
    torch.testing.assert_close(block(x), skip + 0.25 * hidden)


@pytest.mark.parametrize(("stride", "blocks", "gain"), [(8, 2, 1 / 64), (8, 1, 1 / 16), (2, 1, 1 / 4)])
def test_layout__post_gain(stride: int, blocks: int, gain: float) -> None:
    assert layout(stride=stride, blocks_per_group=blocks).post_gain == gain


def test_initialise__same_generator_same_weights_and_the_global_one_stays() -> None:
    before = torch.get_rng_state()
    weights = []
    for _ in range(2):
        encoder = Encoder(layout(), num_outputs=16)
        initialise(encoder, generator=generator(3))
        weights.append(encoder.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(before, torch.get_rng_state())


def test_initialise__deviation_is_one_over_root_fan_in() -> None:
    encoder = Encoder(layout(width=64), num_outputs=512)
    initialise(encoder, generator=generator())
    weight = encoder.state_dict()["blocks.output.conv.weight"]  # 512 inputs
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert encoder.state_dict()["blocks.output.conv.bias"].abs().max() == 0


def test_map_pixels__ends_and_back() -> None:
    x = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(x), torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    # The ends of a sigmoid lie outside the picture's range.
    torch.testing.assert_close(unmap_pixels(torch.tensor([0.0, 1.0])), torch.tensor([-0.125, 1.125]))


def test_encoder__output_is_float32_under_autocast() -> None:
    encoder = Encoder(layout(width=4), num_outputs=5)
    initialise(encoder, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.rand(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_block__adds_the_scaled_residual_to_the_skip(block: type[EncoderBlock] | type[DecoderBlock]) -> None:
    made = block(3, 8, post_gain=0.25)
    initialise(made, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(made(x), made.id_path(x) + made.res_path(x) / 4)
    assert made.res_path(x).abs().mean().item() > 0.01


@pytest.mark.parametrize(("width", "hidden"), [(2, 1), (4, 1), (7, 1), (8, 2), (12, 3)])
def test_block__its_branch_has_a_quarter_of_the_width(width: int, hidden: int) -> None:
    block = EncoderBlock(3, width, post_gain=1.0)
    assert block.state_dict()["res_path.conv_1.weight"].shape == (hidden, 3, 3, 3)


def test_names__are_the_official_ones() -> None:
    layout = Layout(width=4, stride=4, blocks_per_group=2)
    encoder = {name.rpartition(".")[0] for name, _ in Encoder(layout, num_outputs=5).named_modules()}
    decoder = {name.rpartition(".")[0] for name, _ in Decoder(layout, code_dim=5).named_modules()}
    paths = {f"blocks.group_{g}.block_{b}.res_path" for g in (1, 2, 3) for b in (1, 2)}
    assert {name for name in encoder if name.endswith("res_path")} == paths
    assert {name for name in decoder if name.endswith("res_path")} == paths
    branch = Encoder(layout, num_outputs=5).get_submodule("blocks.group_1.block_1.res_path")
    expected = [f"{kind}_{n}" for n in (1, 2, 3, 4) for kind in ("relu", "conv")]
    assert [name for name, _ in branch.named_children()] == expected
