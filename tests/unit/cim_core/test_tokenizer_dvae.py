"""The whole tokenizer: contract, loss, learning, resume."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cim_core.config import TokenizerConfig
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dvae import DiscreteVAE, TokenizerOutput, _calibrated
from cim_core.tokenizers.task import tokenizer_task

TINY = TokenizerConfig(image_size=16, stride=4, width=8, vocab_size=16, code_dim=8)
BOTH = [TINY, replace(TINY, quantiser="relaxed")]
IDS = ["vq", "relaxed"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: TokenizerConfig = TINY, *, seed: int = 0) -> DiscreteVAE:
    return DiscreteVAE(config, generator=generator(seed))


def structured_images(num: int, *, seed: int) -> Tensor:
    """[num, 3, 16, 16] in [0, 1]: two colours with a straight border somewhere between them."""
    g = generator(seed)
    colours = torch.rand(num, 2, 3, 1, 1, generator=g)
    normal, offset = torch.randn(num, 2, 1, 1, generator=g), torch.randn(num, 1, 1, generator=g) / 3
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    side = (normal[:, 0] * y + normal[:, 1] * x > offset)[:, None]
    return torch.where(side, colours[:, 0], colours[:, 1])


class Batch:
    """What a loader yields, as far as the tokenizer looks at it."""

    def __init__(self, images_B3HW: Tensor) -> None:
        self.pixels_B3HW = (images_B3HW * 255).round().to(torch.uint8)


def train(model: DiscreteVAE, optimizer: torch.optim.Optimizer, steps: range) -> list[TokenizerOutput]:
    task, outputs = tokenizer_task(model.train(), seed=0), []
    for step in steps:
        batch = Batch(structured_images(16, seed=step))
        output = task.losses(batch, step=step, micro=0, rank=0, progress=step / 100)
        optimizer.zero_grad()
        output.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        outputs.append(output)
    return outputs


def adamw(model: DiscreteVAE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.mark.parametrize("config", BOTH, ids=IDS)
@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_dvae__shapes_types_and_ranges(config: TokenizerConfig, stride: int) -> None:
    model: Tokenizer = build(replace(config, stride=stride, image_size=2 * stride, width=4))
    assert (model.vocab_size, model.stride, model.is_fake) == (16, stride, False)
    ids = model.encode(torch.rand(2, 3, 2 * stride, 3 * stride))
    assert (ids.shape, ids.dtype) == ((2, 2, 3), torch.int64)
    assert 0 <= ids.min() <= ids.max() < 16
    images = model.decode(ids)
    assert images.shape == (2, 3, 2 * stride, 3 * stride)
    assert 0 <= images.min() <= images.max() <= 1
    assert not images.requires_grad


def test_encode__maps_the_pixels_itself() -> None:
    """The network sees 0.8 x + 0.1, neither bytes nor [-1, 1]."""
    model, images = build(), torch.rand(2, 3, 16, 16, generator=generator())
    z = model.encoder(0.8 * images + 0.1)
    assert torch.equal(model.encode(images), model.quantiser.ids(z))
    assert not torch.allclose(model.encoder(images), z)


def test_decode__sigmoid_then_unmapped_then_clamped() -> None:
    model, ids = build(), torch.arange(16).view(1, 4, 4)
    with torch.no_grad():
        model.decoder.get_parameter("blocks.output.conv.weight").mul_(20)
        logits = model.decoder(model.quantiser.lookup(ids))
    expected = ((torch.sigmoid(logits) - 0.1) / 0.8).clamp(0, 1)
    assert torch.equal(model.decode(ids), expected)
    assert expected.min() == 0
    assert expected.max() == 1


@pytest.mark.parametrize(
    ("images", "lesson"),
    [
        (torch.rand(1, 3, 16, 18), "multiples of the tokenizer's stride 4, got 16 x 18"),
        (torch.rand(3, 16, 16), r"shape \[batch, 3, height, width\], got \[3, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floats in .*, got torch.uint8: divide bytes by 255"),
    ],
)
def test_encode__refuses_what_it_would_misread(images: Tensor, lesson: str) -> None:
    with pytest.raises(ValueError, match=lesson):
        build().encode(images)


def test_loss__is_the_gaussian_likelihood_at_its_best_variance() -> None:
    """Half the log of the squared error, in value and in gradient; the rest is the commitment."""
    model, images = build().train(), structured_images(4, seed=0)
    output = model.training_losses(images, progress=0.0, generator=generator())
    metrics = output.metrics
    painted = model.eval()._paint(_codes_of(build().train(), images))
    error = (painted - images).square().mean()
    assert metrics["reconstruction"].item() == pytest.approx(error.log().item() / 2, rel=1e-4)
    assert metrics["psnr"].item() == pytest.approx(-10 * error.log10().item(), rel=1e-4)
    expected = metrics["reconstruction"] + 0.25 * metrics["commitment"]
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    bias = model.decoder.get_parameter("blocks.output.conv.bias")
    (seen,) = torch.autograd.grad(output.loss, bias)
    (wanted,) = torch.autograd.grad(error.log() / 2, bias)
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-6)


def _codes_of(twin: DiscreteVAE, images: Tensor) -> Tensor:
    """What the decoder of an equally initialised model gets on its first batch."""
    z = twin.encoder(0.8 * images + 0.1)
    codes: Tensor = twin.quantiser(z, progress=0.0, generator=generator()).code_BDhw.detach()
    return codes


def test_metrics__do_not_hold_the_graph() -> None:
    output = build().train().training_losses(structured_images(4, seed=0), progress=0, generator=generator())
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())
    assert not output.reconstruction_B3HW.requires_grad


@pytest.mark.parametrize("config", BOTH, ids=IDS)
def test_gradient__reaches_every_parameter(config: TokenizerConfig) -> None:
    model = build(config).train()
    model(structured_images(4, seed=0), progress=0.5, generator=generator()).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_training__learns_and_uses_the_vocabulary() -> None:
    """Chance is a flat picture of the mean colour; a collapsed codebook gives little more."""
    model = build()
    outputs = train(model, adamw(model), range(100))
    flat = structured_images(256, seed=999)
    chance = -10 * (flat - flat.mean(dim=(0, 2, 3), keepdim=True)).square().mean().log10().item()
    late = [{name: v.item() for name, v in output.metrics.items()} for output in outputs[-20:]]
    assert sum(m["psnr"] for m in late) / 20 > chance + 2.5
    assert outputs[-1].metrics["reconstruction"] < outputs[0].metrics["reconstruction"] - 0.3
    assert min(m["codes_used"] for m in late) > 0.5


def test_training__relaxed_learns() -> None:
    model = build(replace(TINY, quantiser="relaxed", kl_weight=1.0))
    outputs = train(model, adamw(model), range(100))
    first, last = outputs[0].metrics["reconstruction"], outputs[-1].metrics["reconstruction"]
    assert last < first - 0.2


@pytest.mark.parametrize("config", BOTH, ids=IDS)
def test_resume__state_dict_holds_everything(config: TokenizerConfig) -> None:
    """Cut after four steps, continued in fresh objects: bit for bit the uncut run."""
    whole = build(config)
    whole_optimizer = adamw(whole)
    train(whole, whole_optimizer, range(8))
    first = build(config)
    first_optimizer = adamw(first)
    train(first, first_optimizer, range(4))
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict()))
    second = build(config, seed=77)
    second_optimizer = adamw(second)
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    train(second, second_optimizer, range(4, 8))
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in second.state_dict().items())


def test_training__bf16_autocast_and_channels_last() -> None:
    model = build().train()
    images = structured_images(4, seed=0)
    plain = copy.deepcopy(model)(images, progress=0.0, generator=generator())
    model = model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, progress=0.0, generator=generator())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())
    assert output.loss.item() == pytest.approx(plain.loss.item(), abs=0.05)


def test_task__draws_depend_on_place_alone() -> None:
    """Same step, rank and micro-batch: same loss to the bit. Another rank: other noise."""
    model = build(BOTH[1]).train()
    task, batch = tokenizer_task(model, seed=3), Batch(structured_images(4, seed=0))
    place = {"step": 5, "micro": 1, "progress": 0.1}
    losses = [task.losses(batch, rank=rank, **place).loss.item() for rank in (0, 0, 1)]  # type: ignore[arg-type]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_loss__is_calibrated_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cim_core.tokenizers.dvae.dist.world_size", lambda: 2)
    monkeypatch.setattr("cim_core.tokenizers.dvae.dist.all_reduce_sum", lambda error: error + 0.06)
    loss, variance = _calibrated(torch.tensor(0.02))
    assert variance.item() == pytest.approx(0.04)
    assert loss.item() == pytest.approx((0.02 / 0.04 - 1 + math.log(0.04)) / 2)


def test_loss__of_a_perfect_copy_is_finite() -> None:
    model = build()
    output = model.training_losses(torch.full((2, 3, 16, 16), 0.5), progress=0.0, generator=generator())
    assert output.loss.isfinite()
    loss, variance = _calibrated(torch.tensor(0.0))
    assert loss.isfinite()
    assert variance.item() == pytest.approx(2.5e-10)


def test_reconstruction__stays_between_black_and_white() -> None:
    model = build()
    with torch.no_grad():
        model.decoder.blocks.output.conv.bias.copy_(torch.tensor([50.0, -50.0, 0.0]))  # type: ignore[union-attr, operator]
    output = model.training_losses(structured_images(2, seed=0), progress=0.5, generator=generator())
    picture = output.reconstruction_B3HW
    assert (picture.min().item(), picture.max().item()) == (0, 1)
    assert 0 < picture[:, 2].mean().item() < 1
