import timm
import torch
from torch import nn

from cim_core.config import GeneratorConfig, TrainingConfig
from cim_core.models.generator import SmallBEiT
from cim_core.optim import build_optimizer, decays, parameter_groups


def test_groups__names_of_a_vit_without_decay() -> None:
    """BEiT's rule on a network of timm: one-dimensional, bias, position and class tokens."""
    vit = timm.create_model("test_vit", num_classes=0)
    kept = {name for name, p in vit.named_parameters() if not decays(name, p)}
    assert {"pos_embed", "cls_token", "patch_embed.proj.bias", "blocks.0.norm1.weight", "norm.bias"} <= kept
    assert all(
        p.ndim == 1 or name in ("pos_embed", "cls_token")
        for name, p in vit.named_parameters()
        if name in kept
    )
    assert decays("blocks.0.attn.qkv.weight", vit.blocks[0].attn.qkv.weight)


def test_groups__a_beit_generator_decays_its_mask_token_and_its_bias_table() -> None:
    config = GeneratorConfig(depth=2, width=32, heads=2, positions="relative", layer_scale=0.1)
    generator = SmallBEiT(config, image_size=24, patch_size=8, vocab_size=11)
    kept = {name for name, p in generator.named_parameters() if not decays(name, p)}
    assert {"cls_token", "blocks.0.gamma_1", "blocks.1.attn.q_bias", "norm.bias"} <= kept
    decayed = {name for name, _ in generator.named_parameters()} - kept
    assert {"mask_token", "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.qkv.weight"} <= decayed


def test_groups__mask_token_and_two_dimensional_bias() -> None:
    assert decays("mask_token", nn.Parameter(torch.zeros(1, 1, 4)))
    assert not decays("head.bias", nn.Parameter(torch.zeros(2, 2)))


def test_groups__frozen_parameters_stay_out_and_shared_ones_appear_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(requires_grad=False)
    groups = parameter_groups(model, weight_decay=0.1)
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 2)]


def test_groups__an_empty_group_is_left_out() -> None:
    groups = parameter_groups(nn.LayerNorm(3), weight_decay=0.1)
    assert [g["weight_decay"] for g in groups] == [0.0]


def test_optimizer__one_step_by_hand() -> None:
    """First AdamW step: p (1 - lr wd) - lr g / (|g| + eps), decay on the matrix only."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 2.0)
    optimizer = build_optimizer(model, TrainingConfig(steps=1, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.item(), 2.0 * (1 - 0.05) + 0.1)
    torch.testing.assert_close(model.bias.item(), 2.1)


def test_optimizer__takes_betas_from_the_configuration() -> None:
    optimizer = build_optimizer(nn.Linear(1, 1), TrainingConfig(steps=1, beta1=0.8, beta2=0.95))
    assert optimizer.defaults["betas"] == (0.8, 0.95)
