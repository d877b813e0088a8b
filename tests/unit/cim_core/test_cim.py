from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from cim_core.cim import CIM, StepOutput, build_cim
from cim_core.config import GeneratorConfig, MaskingConfig, ObjectiveConfig
from cim_core.data.dataset import Views
from cim_core.errors import ModelError
from cim_core.pretraining import to_unit
from cim_core.registry import DEFAULT_WEIGHTS, OBJECTIVES
from cim_core.task import cim_task
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core.cim_models import model_config, rng, tiny_cim, views_for


def step(cim: CIM, *, seed: int = 0, num_images: int = 3) -> StepOutput:
    output = cim(views_for(cim, num_images=num_images), generator=rng(seed))
    assert isinstance(output, StepOutput)
    return output


@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_forward__kept_positions_hold_golden_tokens_and_masked_ones_samples(objective: str) -> None:
    cim = tiny_cim(model_config(objective=objective))
    views = views_for(cim)
    output = cim(views, generator=rng())
    golden = cim.tokenizer.encode(views.token_pixels_B3HW.float() / 255).flatten(1)
    assert torch.equal(output.golden_BN, golden)
    assert torch.equal(output.sampled_BN[~output.mask_BN], golden[~output.mask_BN])
    assert torch.equal(output.replaced_BN, (output.sampled_BN != golden) & output.mask_BN)
    assert output.logits_MV.shape == (int(output.mask_BN.sum()), 16)


def test_forward__loss_is_mim_plus_weighted_enhancer_loss() -> None:
    for objective, weight in (("respix", 10.0), ("revdet", 1.0)):
        output = step(tiny_cim(model_config(objective=objective)))
        total = output.losses["mim"] + weight * output.losses[objective]
        assert output.loss.item() == pytest.approx(total.item(), rel=1e-6)
        assert output.metrics["mim_loss"].item() == pytest.approx(output.losses["mim"].item())
        assert output.metrics["enhancer_loss"].item() == pytest.approx(output.losses[objective].item())


def test_forward__mim_loss_and_generator_metrics_match_slow_loops() -> None:
    output = step(tiny_cim())
    logits, golden = output.logits_MV.detach().double(), output.golden_BN[output.mask_BN]
    sampled = output.sampled_BN[output.mask_BN]
    loss = entropy = hits = lucky = 0.0
    for row, gold, drawn in zip(logits, golden.tolist(), sampled.tolist(), strict=True):
        probabilities = row.exp() / row.exp().sum()
        loss -= probabilities[gold].log().item()
        entropy -= sum(p * p.log() for p in probabilities).item()
        hits += int(probabilities.argmax()) == gold
        lucky += drawn == gold
    count = len(logits)
    assert output.losses["mim"].item() == pytest.approx(loss / count, rel=1e-5)
    assert output.metrics["entropy"].item() == pytest.approx(entropy / count, rel=1e-5)
    assert output.metrics["mim_accuracy"].item() == pytest.approx(hits / count)
    assert output.metrics["sample_accuracy"].item() == pytest.approx(lucky / count)


def test_metrics__positive_rate_is_mask_rate_times_generator_error() -> None:
    metrics = step(tiny_cim(model_config(objective="revdet")), num_images=16).metrics
    expected = metrics["mask_share"] * (1 - metrics["sample_accuracy"])
    assert 0 < metrics["sample_accuracy"].item() < 1
    assert metrics["revdet_positive_rate"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["replaced_share"].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_metrics__are_scalars_on_the_device_without_gradient(objective: str) -> None:
    for name, metric in step(tiny_cim(model_config(objective=objective))).metrics.items():
        assert metric.shape == (), name
        assert not metric.requires_grad, name


def test_forward__enhancer_loss_reaches_no_weight_that_is_the_generators_own() -> None:
    cim = tiny_cim(model_config(depth=3))
    step(cim).losses["respix"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in cim.generator.parameters())
    assert all(p.grad is not None for p in cim.enhancer.parameters())


def test_forward__mim_loss_reaches_shared_layers_and_no_others_of_the_enhancer() -> None:
    cim = tiny_cim(model_config(shared_blocks=1, depth=2))
    step(cim).losses["mim"].backward()  # type: ignore[no-untyped-call]
    reached = {name for name, p in cim.enhancer.backbone.named_parameters() if p.grad is not None}
    assert reached
    assert all(name.startswith(("patch_embed.", "blocks.0.")) for name in reached)
    assert all(p.grad is not None for p in cim.generator.parameters())


def test_forward__without_sharing_mim_loss_stays_in_the_generator() -> None:
    cim = tiny_cim(model_config(shared_blocks=0))
    step(cim).losses["mim"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in cim.enhancer.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_forward__every_weight_gets_gradient(name: str, objective: str) -> None:
    cim = tiny_cim(model_config(name=name, objective=objective))
    step(cim).loss.backward()  # type: ignore[no-untyped-call]
    assert [key for key, p in cim.named_parameters() if p.grad is None] == []


def test_parameters__shared_ones_appear_once_under_the_enhancer() -> None:
    cim = tiny_cim(model_config(shared_blocks=2))
    names = [name for name, _ in cim.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in cim.parameters()})
    assert "enhancer.backbone.blocks.0.attn.qkv.weight" in names
    assert not any(name.startswith("generator.patch_embed") for name in names)
    restored = tiny_cim(model_config(shared_blocks=2), seed=1)
    restored.load_state_dict(cim.state_dict())
    assert torch.equal(step(cim).loss, step(restored).loss)


class LearningTokenizer(FakeTokenizer):
    """The stand-in with a weight and a mode that a careless model would move."""

    def __init__(self) -> None:
        super().__init__(vocab_size=16, stride=4)
        self.weight = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)


def test_tokenizer__stays_frozen_in_eval_mode_and_out_of_the_state() -> None:
    tokenizer = LearningTokenizer()
    cim = tiny_cim(tokenizer=tokenizer)
    cim.train()
    step(cim).loss.backward()  # type: ignore[no-untyped-call]
    assert not tokenizer.training
    assert not tokenizer.dropout.training
    assert not tokenizer.weight.requires_grad
    assert tokenizer.weight.grad is None
    assert not any("tokenizer" in key or "_frozen" in key for key in cim.state_dict())
    assert id(tokenizer.weight) not in {id(p) for p in cim.parameters()}


def test_tokenizer__moves_with_the_model() -> None:
    tokenizer = LearningTokenizer()
    tiny_cim(tokenizer=tokenizer).to(torch.float64)
    assert tokenizer.weight.dtype == torch.float64


def test_registry__has_every_choice_of_the_configuration_and_no_other() -> None:
    choices = set(get_args(get_type_hints(ObjectiveConfig)["name"]))
    assert set(OBJECTIVES) == set(DEFAULT_WEIGHTS) == choices


def test_build__a_missing_tokenizer_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"tokenizer: must be able to encode and decode, got NoneType"):
        build_cim(model_config(), None)  # type: ignore[arg-type]


def test_build__weights_depend_on_the_seed_alone_and_leave_torchs_generator() -> None:
    torch.manual_seed(5)
    first = tiny_cim(seed=3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second, other = tiny_cim(seed=3).state_dict(), tiny_cim(seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["generator.lm_head.weight"], other["generator.lm_head.weight"])


def test_forward__depends_on_the_passed_generator_alone() -> None:
    cim = tiny_cim().eval()
    torch.manual_seed(1)
    first = step(cim, seed=7)
    torch.manual_seed(2)
    second, other = step(cim, seed=7), step(cim, seed=8)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.sampled_BN, second.sampled_BN)
    assert not torch.equal(first.mask_BN, other.mask_BN)


def test_forward__under_bf16_judges_in_float32() -> None:
    cim = tiny_cim()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = step(cim)
    assert output.loss.dtype == torch.float32
    assert output.prediction.dtype == torch.float32
    assert output.loss.item() == pytest.approx(step(cim).loss.item(), rel=0.2)


def test_corrupted__is_the_decoders_picture_at_image_size() -> None:
    cim = tiny_cim()  # 4 x 4 tokens of 4 pixels, enlarged from 16 to 32
    output = step(cim)
    levels = (output.sampled_BN.float() + 0.5) / 16
    assert output.corrupted_B3HW.shape == (3, 3, 32, 32)
    assert 0 <= output.corrupted_B3HW.min() <= output.corrupted_B3HW.max() <= 1
    # Two pixels around the middle of a cell see, in a bicubic enlargement by 2, only that cell.
    centre = output.corrupted_B3HW[:, 0, 3::8, 3::8].flatten(1)
    assert torch.allclose(centre, levels, atol=1e-5)


def test_corrupted__is_enlarged_as_the_configuration_says() -> None:
    """Enlarged by 2, a bilinear pixel lies a quarter of the way between two; a bicubic one looks further."""
    bicubic, bilinear = (
        tiny_cim(replace(model_config(), interpolation=mode)) for mode in ("bicubic", "bilinear")
    )
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    tokens[0, 1::4] = 8  # the second column of cells, each 4 pixels wide before and 8 after
    dark, bright = 0.5 / 16, 8.5 / 16
    row = bilinear.corrupt(tokens)[0, 0, 16]
    expected = [dark] * 7 + [0.75 * dark + 0.25 * bright, 0.25 * dark + 0.75 * bright] + [bright] * 6
    assert row[:15].tolist() == pytest.approx(expected, abs=1e-6)
    assert bicubic.corrupt(tokens)[0, 0, 16, 9].item() > bright + 0.01


def test_sharing__nothing_is_shared_with_relative_positions() -> None:
    config = model_config()
    relative = tiny_cim(replace(config, generator=GeneratorConfig(depth=2, positions="relative")))
    names = set(relative.state_dict())
    assert "generator.patch_embed.proj.weight" in names
    assert "generator.rel_pos_bias.relative_position_bias_table" in names
    assert "generator.pos_embed" not in names
    step(relative).losses["mim"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in relative.enhancer.parameters())
    assert all(p.grad is not None for p in relative.generator.parameters())


@pytest.mark.parametrize(("stride", "side"), [(8, 32), (16, 64), (2, 8)])
def test_corrupted__has_image_size_at_any_stride(stride: int, side: int) -> None:
    cim = tiny_cim(tokenizer=FakeTokenizer(vocab_size=16, stride=stride))
    views = views_for(cim)
    assert views.token_pixels_B3HW.shape[-1] == side
    assert cim(views, generator=rng()).corrupted_B3HW.shape == (3, 3, 32, 32)


def test_forward__a_tokenizer_view_of_the_wrong_size_is_explained() -> None:
    cim = tiny_cim()
    views = views_for(cim)
    wrong = replace(views, token_pixels_B3HW=views.pixels_B3HW)
    with pytest.raises(ModelError, match=r"must be 16 x 16 pixels, got 32 x 32: a grid of 4 x 4"):
        cim(wrong, generator=rng())


def test_to_unit__refuses_what_is_not_bytes() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]
    with pytest.raises(TypeError, match=r"uint8, 0 to 255, got torch.float32"):
        to_unit(torch.zeros(3))


def test_normalise__is_imagenets_mean_and_deviation() -> None:
    images = torch.rand(2, 3, 4, 4)
    expected = normalize(images, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert torch.allclose(tiny_cim().normalise(images), expected)


def test_corrupted__a_larger_picture_is_shrunk_without_aliasing() -> None:
    cim = tiny_cim(tokenizer=FakeTokenizer(vocab_size=16, stride=32))
    tokens = torch.arange(16).view(1, 16)
    decoded = cim.tokenizer.decode(tokens.view(1, 4, 4))
    assert decoded.shape[-1] == 128
    expected = F.interpolate(decoded, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    plain = F.interpolate(decoded, size=(32, 32), mode="bicubic").clamp(0, 1)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.allclose(cim.corrupt(tokens), expected)


class CountingTokenizer(FakeTokenizer):
    """Keeps how many images it was given at a time."""

    def __init__(self) -> None:
        super().__init__(vocab_size=16, stride=16)
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        self.encoded.append(len(images_B3HW))
        return super().encode(images_B3HW)

    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(ids_Bhw))
        return super().decode(ids_Bhw)


def test_tokenizer__gets_as_many_images_as_a_portion_holds() -> None:
    """A grid of 4 x 4 tokens of 16 pixels makes 64 x 64 pixels, of which 2**14 are four images."""
    tokenizer = CountingTokenizer()
    step(tiny_cim(tokenizer=tokenizer), num_images=9)
    assert tokenizer.encoded == tokenizer.decoded == [4, 4, 1]


@pytest.mark.parametrize("num_images", [32, 40], ids=["as many as pixels a side", "more"])
def test_corrupted__does_not_depend_on_how_many_images_there_are(num_images: int) -> None:
    cim = tiny_cim()
    tokens = torch.randint(16, (num_images, 16), generator=rng())
    alone = torch.cat([cim.corrupt(one[None]) for one in tokens])
    assert torch.equal(cim.corrupt(tokens), alone)


def test_to__moves_every_weight_and_buffer() -> None:
    cim = tiny_cim().double()
    kinds = {tensor.dtype for tensor in (*cim.parameters(), *cim.buffers()) if tensor.is_floating_point()}
    assert kinds == {torch.float64}


def test_state__holds_no_constants() -> None:
    assert not {"mean", "std"} & set(tiny_cim().state_dict())


@pytest.mark.parametrize("can", ["encode", "decode"])
def test_build__a_tokenizer_must_encode_and_decode(can: str) -> None:
    half = SimpleNamespace(**{can: lambda images: images})
    with pytest.raises(ModelError, match="must be able to encode and decode, got SimpleNamespace"):
        build_cim(model_config(), half)


def test_build__the_seed_is_0_where_none_is_given() -> None:
    config, tokenizer = model_config(), FakeTokenizer(vocab_size=16, stride=4)
    given, open_ = build_cim(config, tokenizer, seed=0), build_cim(config, tokenizer)
    assert all(map(torch.equal, given.state_dict().values(), open_.state_dict().values()))
    other = build_cim(config, tokenizer, seed=1)
    assert not all(map(torch.equal, given.state_dict().values(), other.state_dict().values()))


def test_encoder__is_the_running_average_where_there_is_one() -> None:
    plain = tiny_cim()
    assert plain.encoder is plain.enhancer.backbone
    config = model_config()
    averaged = tiny_cim(replace(config, enhancer=replace(config.enhancer, ema_decay=0.9)))
    assert averaged.average is not None
    assert averaged.encoder is averaged.average.module


@pytest.mark.parametrize("size", [(65, 13), (24, 8)])
def test_forward__any_grid(size: tuple[int, int]) -> None:
    image_size, patch_size = size
    for objective in ("respix", "revdet"):
        cim = tiny_cim(model_config(objective=objective, image_size=image_size, patch_size=patch_size))
        output = step(cim)
        assert output.golden_BN.shape == (3, (image_size // patch_size) ** 2)
        assert torch.isfinite(output.loss)


def test_task__draws_by_step_microbatch_and_rank_and_by_nothing_else() -> None:
    cim = tiny_cim(model_config(masking=MaskingConfig(min_ratio=0.4, max_ratio=0.6))).eval()
    task = cim_task(cim, seed=0)
    views = views_for(cim, num_images=8)

    def mask(*, step: int = 0, micro: int = 0, rank: int = 0, progress: float = 0.0) -> torch.Tensor:
        output = task.losses(views, step=step, micro=micro, rank=rank, progress=progress)
        assert isinstance(output, StepOutput)
        return output.mask_BN

    first = mask()
    assert torch.equal(first, mask(progress=0.9))
    assert not torch.equal(first, mask(step=1))
    assert not torch.equal(first, mask(micro=1))
    assert not torch.equal(first, mask(rank=1))


def test_training__learns_one_batch() -> None:
    cim = tiny_cim(model_config(objective="revdet"))
    views: Views = views_for(cim, num_images=8)
    optimizer = torch.optim.AdamW(cim.parameters(), lr=3e-3)
    losses = []
    for number in range(40):
        output = cim(views, generator=rng(number))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["mim_loss"].item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
