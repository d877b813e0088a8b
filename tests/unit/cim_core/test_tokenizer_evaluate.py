"""Numbers and picture of an evaluation, on a tokenizer whose answers are known."""

import math

import pytest
import torch

from cim_core.config import Quantiser, TokenizerConfig, TokenizerTrainingConfig
from cim_core.tokenizers.evaluate import (
    RATE_TIMES_WIDTH,
    collapse,
    evaluate_tokenizer,
    reconstruction_grid,
)
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core.test_ssim import theirs


def test_evaluate__known_errors_and_ids() -> None:
    """Two levels, decoded to 0.25 and 0.75: white is off by 0.25, 0.65 by 0.1; both are id 1."""
    fake = FakeTokenizer(vocab_size=2, stride=2)
    batches = [torch.ones(1, 3, 4, 4), torch.full((3, 3, 4, 4), 0.65)]
    values = dict(evaluate_tokenizer(fake, batches))
    assert values["psnr"] == pytest.approx(-10 * math.log10((0.25**2 + 3 * 0.1**2) / 4), rel=1e-5)
    assert values["codes_used"] == 0.5
    assert values["perplexity"] == pytest.approx(1)


def test_evaluate__perplexity_over_all_batches() -> None:
    fake = FakeTokenizer(vocab_size=4, stride=2)
    batches = [fake.decode(torch.full((1, 1, 1), i)) for i in range(4)]
    values = dict(evaluate_tokenizer(fake, iter(batches)))
    assert values["perplexity"] == pytest.approx(4)
    assert values["codes_used"] == 1
    assert values["psnr"] > 90  # a perfect copy stays finite
    assert math.isfinite(values["psnr"])


def test_evaluate__ssim_is_the_mean_over_the_images_of_all_batches() -> None:
    """Of a picture that the fake keeps and two that it cannot: by scikit-image's numbers, 1 and less."""
    fake = FakeTokenizer(vocab_size=64, stride=2)
    g = torch.Generator().manual_seed(0)
    kept = fake.decode(torch.randint(64, (1, 8, 8), generator=g))
    lost = torch.rand(2, 3, 16, 16, generator=g)
    values = dict(evaluate_tokenizer(fake, [kept, lost]))
    expected = [theirs(image, fake.decode(fake.encode(image[None]))[0]) for image in (*kept, *lost)]
    assert values["ssim"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert expected[0] == pytest.approx(1) and expected[1] < 0.9  # noqa: PT018


def test_evaluate__images_smaller_than_a_window_have_no_ssim() -> None:
    assert "ssim" not in dict(evaluate_tokenizer(FakeTokenizer(), [torch.rand(1, 3, 8, 8)]))


@pytest.mark.parametrize(
    ("perplexity", "told"), [(51.2, None), (51.1, "512 codes are used like 51.1"), (1.0, "4% occur at all")]
)
def test_collapse__is_told_below_a_tenth_of_the_vocabulary(perplexity: float, told: str | None) -> None:
    said = collapse({"perplexity": perplexity, "codes_used": 0.04}, TokenizerConfig(vocab_size=512))
    assert said is None if told is None else told in str(said)


@pytest.mark.parametrize(
    ("quantiser", "width", "advice"),
    [
        # Lab log, 2026-11-28: what throws a network of width 64 off is a good rate for one of width 16.
        ("vq", 64, "learning_rate near 0.002, lengthen training.warmup, give"),
        ("vq", 16, "learning_rate near 0.008, lengthen training.warmup, give"),
        ("relaxed", 64, "learning_rate near 0.002, lengthen training.warmup, raise model.kl_weight, give"),
    ],
)
def test_collapse__advises_what_helps_this_quantiser(quantiser: Quantiser, width: int, advice: str) -> None:
    config = TokenizerConfig(quantiser=quantiser, width=width)
    said = collapse({"perplexity": 2.0, "codes_used": 0.04}, config)
    assert f"Train longer, bring training.{advice}" in str(said)


def test_collapse__advises_the_default_rate_at_the_default_width() -> None:
    assert TokenizerTrainingConfig(steps=1).learning_rate * TokenizerConfig().width == RATE_TIMES_WIDTH


def test_evaluate__no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        list(evaluate_tokenizer(FakeTokenizer(), []))


def test_grid__original_beside_reconstruction() -> None:
    images = torch.zeros(2, 3, 16, 16)
    images[0, 0] = 1.0  # red, which the fake cannot keep: brightness 1/3 is level 21 of 64
    picture = reconstruction_grid(FakeTokenizer(), images)
    left, right = 4, 4 + 128 + 4
    assert picture.size == (2 * 132 + 4, 20 + 2 * 132)
    assert picture.getpixel((left + 64, 20 + 64)) == (255, 0, 0)
    grey = round(21.5 / 64 * 255)
    assert picture.getpixel((right + 64, 20 + 64)) == (grey, grey, grey)
    assert picture.getpixel((left + 64, 20 + 132 + 64)) == (0, 0, 0)


def test_grid__eight_rows_at_most() -> None:
    picture = reconstruction_grid(FakeTokenizer(), torch.rand(11, 3, 8, 8))
    assert picture.height == 20 + 8 * 132
