import math

import pytest
import torch
from torch import Tensor

from cim_core.cim import sample_tokens
from tests.unit.cim_core.cim_models import rng


def test_sample_tokens__follows_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits.double() / temperature).softmax(0)
        draws = sample_tokens(logits.expand(20_000, 3), temperature, rng())
        share = torch.bincount(draws, minlength=3).double() / 20_000
        deviation = (expected * (1 - expected) / 20_000).sqrt()
        assert bool(((share - expected).abs() < 5 * deviation).all())


def drawn_slowly(logits_V: Tensor, point: float) -> int:
    """The first token at whose end the sum of the probabilities, in float64, is beyond the point."""
    end = 0.0
    for token, probability in enumerate(logits_V.double().softmax(0).tolist()):
        end += probability
        if end > point:
            return token
    return len(logits_V) - 1


@pytest.mark.parametrize("vocab_size", [2, 16, 8192])
def test_sample_tokens__are_where_a_point_of_the_row_lies(vocab_size: int) -> None:
    logits = 3 * torch.randn(200, vocab_size, generator=rng(1))
    points = torch.rand(200, generator=rng(7)).tolist()
    expected = [drawn_slowly(row / 0.9, point) for row, point in zip(logits, points, strict=True)]
    drawn = sample_tokens(logits, 0.9, rng(7))
    # In float32 an end is off by 1e-5 at most, so that a point right beside it may fall on the other side.
    assert (drawn == torch.tensor(expected)).float().mean() > 0.99
    assert (drawn - torch.tensor(expected)).abs().max() <= 1
    assert len(set(drawn.tolist())) > min(vocab_size, 30) // 2


def test_sample_tokens__over_a_whole_vocabulary_follow_their_shares() -> None:
    logits = 2 * torch.randn(8192, generator=rng(3))
    expected = logits.double().softmax(0).view(64, 128).sum(1)  # of 128 neighbours each
    drawn = torch.cat([sample_tokens(logits.expand(500, -1), 1.0, rng(n)) for n in range(40)])
    share = torch.bincount(drawn // 128, minlength=64).double() / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert bool(((share - expected).abs() < 5 * deviation).all())


@pytest.mark.parametrize("point", [0.0, 1 - 2**-24])
def test_sample_tokens__what_is_impossible_is_never_drawn(
    point: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, point))
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).repeat(4, 1)
    assert sample_tokens(logits, 1.0, rng()).tolist() == [1 if point == 0 else 3] * 4


def test_sample_tokens__of_no_numbers_is_a_token_that_the_decoder_knows() -> None:
    assert sample_tokens(torch.full((2, 16), math.nan), 1.0, rng()).tolist() == [15, 15]


def test_sample_tokens__parts_that_do_not_add_up_to_one_leave_no_gap_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    logits = torch.randn(200, 64, generator=rng(2))
    logits[:, -1] = -math.inf
    assert set(sample_tokens(logits, 1.0, rng()).tolist()) == {62}
    totals = logits.softmax(dim=-1).cumsum(dim=-1)[:, -1]
    assert totals.min() < 1 < totals.max()
