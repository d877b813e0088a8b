import math
from typing import Any

import pytest
import torch

from cim_core.config import EnhancerConfig, GeneratorConfig
from cim_core.errors import ConfigError
from cim_core.models.enhancer import Enhancer
from cim_core.models.generator import SmallBEiT
from tests.unit.cim_core.cim_models import TINY_VIT


def small(*, width: int = 32, heads: int = 2, depth: int = 2, image_size: int = 24) -> SmallBEiT:
    config = GeneratorConfig(depth=depth, width=width, heads=heads)
    return SmallBEiT(config, image_size=image_size, patch_size=8, vocab_size=11)


def heads_of(model: SmallBEiT) -> int:
    block: Any = model.blocks[0]
    return int(block.attn.num_heads)


def vit() -> Enhancer:
    config = EnhancerConfig(name="vit_tiny_patch16_224", options=TINY_VIT)
    return Enhancer(config, image_size=24, patch_size=8)


def test_forward__gives_logits_in_the_order_of_nonzero() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 24, 24)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2] = mask[0, 7] = mask[1, 0] = True
    both = model(images, mask)
    second = model(images[1:], mask[1:])
    assert both.shape == (3, 11)
    assert torch.allclose(both[2], second[0], atol=1e-5)


def test_forward__what_a_masked_patch_shows_does_not_matter() -> None:
    model = small().eval()
    images = torch.randn(1, 3, 24, 24)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 4] = True
    changed = images.clone()
    changed[:, :, 8:16, 8:16] += 5
    visible = images.clone()
    visible[:, :, :8, :8] += 5
    assert torch.equal(model(images, mask), model(changed, mask))
    assert not torch.allclose(model(images, mask), model(visible, mask), atol=1e-4)


def test_forward__masked_positions_are_told_apart_by_place() -> None:
    model = small().eval()
    images = torch.zeros(1, 3, 24, 24)
    logits = model(images, torch.ones(1, 9, dtype=torch.bool))
    assert float((logits[0] - logits[5]).abs().max()) > 1e-4


def test_init__follows_the_table() -> None:
    model = small(width=64, depth=3)
    blocks: list[Any] = list(model.blocks)
    for number, block in enumerate(blocks, start=1):
        expected = 0.02 / math.sqrt(2 * number)
        assert float(block.attn.proj.weight.abs().max()) <= expected + 1e-7
        # A normal cut at one deviation has 0.54 of its deviation.
        assert float(block.mlp.fc2.weight.std()) == pytest.approx(0.54 * expected, rel=0.05)
        assert float(block.mlp.fc1.weight.std()) == pytest.approx(0.54 * 0.02, rel=0.05)
        assert not block.mlp.fc1.bias.any()
    assert float(model.lm_head.weight.abs().max()) <= 0.02
    assert model.pos_embed is not None
    assert model.pos_embed.any()
    assert model.mask_token.any()


def test_width__defaults_to_the_vits_and_else_to_384() -> None:
    config = GeneratorConfig(depth=1)
    with_vit = SmallBEiT(config, image_size=16, patch_size=8, vocab_size=4, enhancer_width=192)
    with_cnn = SmallBEiT(config, image_size=16, patch_size=8, vocab_size=4)
    assert with_vit.lm_head.in_features == 192
    assert heads_of(with_vit) == 3
    assert with_cnn.lm_head.in_features == 384
    assert heads_of(with_cnn) == 6


def test_sharing__shared_layers_are_used_but_owned_by_the_enhancer() -> None:
    enhancer = vit()
    config = GeneratorConfig(depth=3)
    model = SmallBEiT(config, image_size=24, patch_size=8, vocab_size=11, shared=enhancer.shared_layers(2),
                      enhancer_width=32)  # fmt: skip
    names = set(model.state_dict())
    assert len(model.blocks) == 1
    assert not any(name.startswith(("patch_embed", "blocks.1", "blocks.2")) for name in names)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, :4] = False
    model(torch.randn(1, 3, 24, 24), mask).square().sum().backward()
    backbone: Any = enhancer.backbone
    assert backbone.patch_embed.proj.weight.grad is not None
    assert backbone.blocks[1].mlp.fc2.weight.grad is not None
    assert backbone.norm.weight.grad is None


def test_sharing__does_not_touch_the_enhancers_weights_at_construction() -> None:
    enhancer = vit()
    before = {name: tensor.clone() for name, tensor in enhancer.state_dict().items()}
    SmallBEiT(GeneratorConfig(depth=2), image_size=24, patch_size=8, vocab_size=11,
              shared=enhancer.shared_layers(2), enhancer_width=32)  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in enhancer.state_dict().items())


def test_sharing__follows_the_enhancer_when_it_is_replaced_in_memory() -> None:
    enhancer = vit()
    model = SmallBEiT(GeneratorConfig(depth=2), image_size=24, patch_size=8, vocab_size=11,
                      shared=enhancer.shared_layers(2), enhancer_width=32).double()  # fmt: skip
    enhancer.double()
    logits = model(torch.randn(1, 3, 24, 24, dtype=torch.float64), torch.ones(1, 9, dtype=torch.bool))
    assert logits.dtype == torch.float64


def test_sharing__sizes_that_do_not_match_are_all_named() -> None:
    config = GeneratorConfig(depth=1, width=48, heads=3)
    with pytest.raises(ConfigError) as caught:
        SmallBEiT(config, image_size=24, patch_size=8, vocab_size=4, shared=vit().shared_layers(2))
    text = str(caught.value)
    assert "generator.width: must equal the enhancer's 32" in text
    assert "generator.heads: must equal the enhancer's 2" in text
    assert "generator.depth: must be at least the 2 blocks" in text


def test_heads__must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"generator.heads: must divide the width 384, got 5"):
        SmallBEiT(GeneratorConfig(heads=5), image_size=16, patch_size=8, vocab_size=4)
