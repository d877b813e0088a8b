"""The estimate against published sizes and formulas by hand; memory: test_estimate_memory.py."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from cim_core.cim import build_cim
from cim_core.config import (
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.engine.background import Background as Background  # for the child process
from cim_core.estimate.cost import Cost, pretrain_cost, tokenizer_cost
from cim_core.methods import build_model
from cim_core.tokenizers.dvae import DiscreteVAE

CPU = torch.device("cpu")
SMALL_TOKENIZER = TokenizerConfig(image_size=32, width=8, vocab_size=32, code_dim=16)
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 2, "batch_size": 2, "precision": "fp32", **changes})


def model(name: str, objective: Literal["respix", "revdet"] = "respix", **changes: Any) -> ModelConfig:
    enhancer = EnhancerConfig(name=name, options=TINY if name.startswith("vit_tiny") else {})
    source = TokenizerSource(source="job:tokens")
    return replace(
        ModelConfig(tokenizer=source, enhancer=enhancer, objective=ObjectiveConfig(name=objective)), **changes
    )


def official(name: str, **generator: Any) -> Cost:
    """Beside the official tokenizer, nothing shared."""
    config = model(name, generator=GeneratorConfig(**generator), tokenizer=TokenizerSource(source="dall-e"))
    config = replace(config, enhancer=replace(config.enhancer, shared_blocks=0))
    return pretrain_cost(config, training(), tokenizer=None)


# Sizes


@pytest.mark.parametrize(
    ("name", "macs", "generator_macs", "generator_parameters", "step_macs"),
    [
        # METHOD section 9: multiply-accumulates in 1e9, parameters in 1e6; the small BEiT is 4 deep.
        ("vit_base_patch16_224", 17.6, 6.6, 35.2, 128),
        ("vit_small_patch16_224", 4.6, 1.9, 10.5, 75),
        ("resnet50", 4.1, 1.9, 10.5, 73),
    ],
)
def test_pretrain__published_sizes(
    name: str, macs: float, generator_macs: float, generator_parameters: float, step_macs: float
) -> None:
    cost = official(name, depth=4)
    assert cost.macs_per_image["enhancer"] / 1e9 == pytest.approx(macs, rel=0.02)
    assert cost.macs_per_image["generator"] / 1e9 == pytest.approx(generator_macs, rel=0.03)
    assert cost.parameters["generator"] / 1e6 == pytest.approx(generator_parameters, rel=0.02)
    # Section 8.3: encoding at 112 pixels, and decoding by a table look-up.
    assert cost.macs_per_image["tokenizer_encode"] / 1e9 == pytest.approx(26.1, rel=0.01)
    assert cost.macs_per_image["tokenizer_decode"] / 1e9 == pytest.approx(29.3, rel=0.01)
    assert cost.parameters["tokenizer"] == 53_786_240 + 43_829_766
    assert cost.macs_per_training_image / 1e9 == pytest.approx(step_macs, rel=0.03)


def test_pretrain__a_vit_counted_by_hand() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    found = pretrain_cost(config, training(), tokenizer=SMALL_TOKENIZER).macs_per_image
    tokens, width, positions, vocabulary = 65, 64, 64, 32
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # qkv, output, MLP of 4 widths; two products
    embedding = positions * 3 * 8**2 * width
    masked = round((round(0.51 * positions) + round(0.61 * positions)) / 2)
    assert found["enhancer"] == embedding + TINY["depth"] * block
    assert found["head"] == positions * width * 3 * 8**2
    assert found["generator"] == embedding + 4 * block + masked * width * vocabulary


def test_pretrain__shared_layers_are_parameters_once_and_work_twice() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    alone = replace(config, enhancer=replace(config.enhancer, shared_blocks=0))
    shared, own = (pretrain_cost(c, training(), tokenizer=SMALL_TOKENIZER) for c in (config, alone))
    cim = build_cim(config, DiscreteVAE(SMALL_TOKENIZER, generator=torch.Generator()))
    parts = ("enhancer", "generator", "head")
    assert sum(shared.parameters[part] for part in parts) == sum(p.numel() for p in cim.parameters())
    assert own.parameters["generator"] > shared.parameters["generator"]
    assert own.macs_per_image == shared.macs_per_image


def test_pretrain__block_masks_cost_what_random_ones_do() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    blocks = replace(config, masking=replace(config.masking, strategy="block"))
    costs = [pretrain_cost(c, training(), tokenizer=SMALL_TOKENIZER) for c in (config, blocks)]
    assert costs[0] == costs[1]


def test_pretrain__an_unknown_tokenizer_is_left_out() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    cost = pretrain_cost(config, training(), tokenizer=None)
    assert cost.parameters["tokenizer"] == cost.memory_per_worker.tokenizer_bytes == 0
    assert cost.macs_per_image["tokenizer_encode"] == cost.macs_per_image["tokenizer_decode"] == 0
    # The output layer has DALL-E's 8192 tokens.
    own = pretrain_cost(config, training(), tokenizer=SMALL_TOKENIZER)
    assert cost.parameters["generator"] - own.parameters["generator"] == (8192 - 32) * 65


def peer(method: Method, name: str = "vit_tiny_patch16_224", **changes: Any) -> ModelConfig:
    enhancer = EnhancerConfig(name=name, options=TINY if name.startswith("vit_tiny") else {})
    source = TokenizerSource(source="dall-e") if method == "beit" else None
    return ModelConfig(method=method, tokenizer=source, enhancer=enhancer, **changes)


def test_peers__published_sizes() -> None:
    """METHOD section 9: a step of BEiT with ViT-B takes about 80 G, one of MAE about 29 G."""
    steps = {
        method: pretrain_cost(peer(method, "vit_base_patch16_224"), training(), tokenizer=None)
        for method in ("beit", "mae")
    }
    assert steps["beit"].macs_per_training_image / 1e9 == pytest.approx(80, rel=0.03)
    assert steps["mae"].macs_per_training_image / 1e9 == pytest.approx(29, rel=0.03)
    assert list(steps["mae"].macs_per_image) == ["enhancer", "decoder"]
    assert steps["mae"].memory_per_worker.tokenizer_bytes == 0
    assert steps["beit"].parameters["tokenizer"] > 50_000_000


def test_peers__counted_by_hand() -> None:
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 8}
    decoder = DecoderConfig(depth=3, width=32, heads=2)
    mae = pretrain_cost(peer("mae", decoder=decoder, **sizes), training(), tokenizer=None)
    simmim = pretrain_cost(peer("simmim", **sizes), training(), tokenizer=None)

    def block(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    positions, visible, width, pixels = 64, 16, 64, 3 * 8**2
    embedding = positions * pixels * width
    assert mae.macs_per_image == {
        "enhancer": embedding + 2 * block(visible + 1, width),
        "decoder": (visible + 1) * width * 32 + 3 * block(positions + 1, 32) + positions * 32 * pixels,
    }
    assert simmim.macs_per_image == {
        "enhancer": embedding + 2 * block(positions + 1, width),
        "head": positions * width * pixels,
    }
    assert simmim.macs_per_training_image == 3 * sum(simmim.macs_per_image.values())
    assert simmim.parameters["head"] == width * pixels + pixels + width  # weight, bias, mask token


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_peers__memory_is_that_of_a_real_step(method: Method) -> None:
    """Weights, gradients and both moments of AdamW, by the real model's own tensors."""
    config = peer(method, image_size=64, patch_size=8)
    cost = pretrain_cost(config, training(), tokenizer=None)
    real = build_model(config)
    trained = sum(p.numel() for p in real.parameters())
    assert sum(cost.parameters.values()) == trained
    assert cost.memory_per_worker.gradients_bytes == 4 * trained
    counters = 4 * len(list(real.parameters()))
    assert cost.memory_per_worker.optimizer_bytes == 2 * 4 * trained + counters
    assert cost.memory_per_worker.activations_bytes > 0


def test_tokenizer__a_search_is_no_training() -> None:
    costs = {q: tokenizer_cost(replace(SMALL_TOKENIZER, quantiser=q), training()) for q in ("vq", "relaxed")}
    for name, cost in costs.items():
        encoder, quantiser, decoder = cost.macs_per_image.values()
        times = 1 if name == "vq" else 3
        assert quantiser == 16 * 32 * 16  # tokens, codes, channels: distances, or a blend
        assert cost.macs_per_training_image == 3 * (encoder + decoder) + times * quantiser
        assert cost.memory_per_worker.tokenizer_bytes == 0
