"""Relative positions as in BEiT, and layer scale: against the same network written out slowly."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.config import EnhancerConfig, GeneratorConfig
from cim_core.errors import ConfigError
from cim_core.models.enhancer import Enhancer
from cim_core.models.generator import SmallBEiT
from tests.unit.cim_core.cim_models import TINY_VIT

GRID, WIDTH, HEADS = 3, 16, 2


def small(
    *, positions: Literal["absolute", "relative"] = "relative", layer_scale: float = 0.0, depth: int = 2
) -> SmallBEiT:
    config = GeneratorConfig(
        depth=depth, width=WIDTH, heads=HEADS, positions=positions, layer_scale=layer_scale
    )
    return SmallBEiT(config, image_size=GRID * 8, patch_size=8, vocab_size=11)


def shaken(model: SmallBEiT) -> SmallBEiT:
    """The model in float64 with weights of a size at which every part of it shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.double().eval()


def table_row(query: int, key: int) -> int:
    """The row of the bias table for two of the 1 + g * g places, the class token's first."""
    rows = (2 * GRID - 1) ** 2
    if query == 0 and key == 0:
        return rows + 2
    if query == 0:
        return rows
    if key == 0:
        return rows + 1
    down = (query - 1) // GRID - (key - 1) // GRID
    right = (query - 1) % GRID - (key - 1) % GRID
    return (down + GRID - 1) * (2 * GRID - 1) + right + GRID - 1


def attention_by_hand(attention: Any, x_ND: Tensor, table: Tensor) -> Tensor:
    """One image, one head and one query at a time; keys have no bias."""
    size = WIDTH // HEADS
    query_w, key_w, value_w = attention.qkv.weight.chunk(3)
    queries = x_ND @ query_w.T + attention.q_bias
    keys = x_ND @ key_w.T
    values = x_ND @ value_w.T + attention.v_bias
    result = torch.zeros_like(x_ND)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x_ND)):
            scores = torch.stack(
                [
                    queries[i, part] @ keys[j, part] / math.sqrt(size) + table[table_row(i, j), head]
                    for j in range(len(x_ND))
                ]
            )
            result[i, part] = scores.softmax(0) @ values[:, part]
    return attention.proj(result)  # type: ignore[no-any-return]


def logits_by_hand(model: SmallBEiT, image_3HW: Tensor, masked: list[int]) -> Tensor:
    """Logits of one image, block after block."""
    assert model.patch_embed is not None
    assert model.rel_pos_bias is not None
    table = model.rel_pos_bias.relative_position_bias_table
    tokens = model.patch_embed(image_3HW[None])[0]
    for place in masked:
        tokens[place] = model.mask_token[0, 0]
    x = torch.cat([model.cls_token[0], tokens])
    for block in model.blocks:
        parts: Any = block
        gamma_1, gamma_2 = (1, 1) if parts.gamma_1 is None else (parts.gamma_1, parts.gamma_2)
        x = x + gamma_1 * attention_by_hand(parts.attn, parts.norm1(x), table)
        hidden = F.gelu(parts.mlp.fc1(parts.norm2(x)))
        x = x + gamma_2 * parts.mlp.fc2(hidden)
    logits: Tensor = model.lm_head(model.norm(x))[1:][masked]
    return logits


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_relative__matches_attention_by_hand(layer_scale: float) -> None:
    model = shaken(small(layer_scale=layer_scale))
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, GRID * GRID, dtype=torch.bool)
    mask[0, [1, 5]] = mask[1, [0]] = True
    with torch.no_grad():
        expected = [logits_by_hand(model, images[0], [1, 5]), logits_by_hand(model, images[1], [0])]
        assert torch.allclose(model(images, mask), torch.cat(expected), atol=1e-9)


def test_relative__one_table_for_all_blocks_starts_at_zero() -> None:
    model = small(depth=3)
    tables = {name: p for name, p in model.named_parameters() if "relative_position_bias_table" in name}
    assert [p.shape for p in tables.values()] == [((2 * GRID - 1) ** 2 + 3, HEADS)]
    assert not any(p.any() for p in tables.values())


def test_relative__has_no_absolute_positions_and_no_bias_on_keys() -> None:
    model = small()
    names = {name.rsplit(".", 1)[-1] for name in model.state_dict()}
    assert "pos_embed" not in names
    assert {"q_bias", "v_bias"} <= names
    assert not names & {"k_bias"}
    first: Any = model.blocks[0]
    assert first.attn.qkv.bias is None
    assert not first.attn.k_bias.any()


def test_relative__every_parameter_learns() -> None:
    model = shaken(small(layer_scale=0.1)).train()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, ::2] = True
    model(torch.randn(2, 3, 24, 24, dtype=torch.float64), mask).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_relative__masked_positions_are_told_apart_once_the_table_has_learned() -> None:
    """With a table of zeros nothing but the visible patches says where a mask token lies."""
    model = small().eval()
    images, mask = torch.zeros(1, 3, 24, 24), torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    images[:, :, 8:16, 8:16] = 1
    assert model.rel_pos_bias is not None
    with torch.no_grad():
        before = model(images, mask)
        torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
        after = model(images, mask)
    assert torch.allclose(before[0], before[5], atol=1e-6)
    assert (after[0] - after[5]).abs().max().item() > 1e-5


def test_relative__works_under_autocast() -> None:
    model = small().train()
    mask = torch.ones(1, 9, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(1, 3, 24, 24), mask)
    logits.float().square().sum().backward()
    assert model.rel_pos_bias is not None
    assert torch.isfinite(model.rel_pos_bias.relative_position_bias_table.grad).all()


def test_relative__starts_as_the_table_of_initial_weights_says() -> None:
    for number, block in enumerate(small(depth=3).blocks, start=1):
        parts: Any = block
        bound = 0.02 / math.sqrt(2 * number)
        for weight in (parts.attn.proj.weight, parts.mlp.fc2.weight):
            assert 0.8 * bound < weight.abs().max().item() <= bound + 1e-7
        assert 0.8 * 0.02 < parts.attn.qkv.weight.abs().max().item() <= 0.02 + 1e-7
        assert not any(bias.any() for bias in (parts.attn.q_bias, parts.attn.v_bias, parts.attn.proj.bias))


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_layer_scale__is_on_both_branches_of_every_block(positions: Literal["absolute", "relative"]) -> None:
    scaled, plain = small(positions=positions, layer_scale=0.1), small(positions=positions)
    extra = {name: p for name, p in scaled.named_parameters() if "gamma" in name}
    assert len(extra) == 2 * 2
    assert all(p.shape == (WIDTH,) and torch.all(p == 0.1) for p in extra.values())
    assert set(scaled.state_dict()) - set(plain.state_dict()) == set(extra)


def test_layer_scale__scales_both_branches() -> None:
    """With one block the network's sum is x + gamma * attention + gamma * mlp; gamma 0 leaves x."""
    model = shaken(small(positions="absolute", layer_scale=0.1, depth=1))
    block: Any = model.blocks[0]
    x = torch.randn(1, 10, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        block.ls1.gamma.zero_()
        only_mlp = block(x)
        assert torch.allclose(only_mlp, x + block.ls2.gamma * block.mlp(block.norm2(x)))
        block.ls2.gamma.zero_()
        assert torch.equal(block(x), x)


def test_relative__refuses_shared_blocks() -> None:
    vit = Enhancer(EnhancerConfig(name="vit_tiny_patch16_224", options=TINY_VIT), image_size=24, patch_size=8)
    config = GeneratorConfig(depth=2, positions="relative")
    with pytest.raises(ConfigError, match=r"generator.positions: must be absolute where blocks are shared"):
        SmallBEiT(config, image_size=24, patch_size=8, vocab_size=4, shared=vit.shared_layers(1),
                  enhancer_width=32)  # fmt: skip
