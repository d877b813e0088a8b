"""The stand-in says what it is and keeps the contract."""

import pytest
import torch

from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.fake import FakeTokenizer


def test_fake__says_so() -> None:
    fake: Tokenizer = FakeTokenizer()
    assert fake.is_fake
    assert (fake.vocab_size, fake.stride) == (64, 8)


@pytest.mark.parametrize(("vocab_size", "stride"), [(2, 1), (64, 8), (100, 5), (8192, 16)])
def test_fake__ids_survive_decode_and_encode(vocab_size: int, stride: int) -> None:
    fake = FakeTokenizer(vocab_size=vocab_size, stride=stride)
    ids = torch.arange(vocab_size).view(1, 1, -1)
    images = fake.decode(ids)
    assert images.shape == (1, 3, stride, vocab_size * stride)
    assert 0 < images.min() < images.max() < 1
    assert torch.equal(fake.encode(images), ids)


def test_fake__a_token_is_the_mean_of_its_cell() -> None:
    image = torch.zeros(1, 3, 4, 8)
    image[0, :, :, 4:] = torch.tensor([1.0, 0.5, 0.0])[:, None, None]  # mean 0.5, in a cell of its own
    image[0, :, 0, 0] = 1.0  # one pixel of 16
    assert FakeTokenizer(vocab_size=32, stride=4).encode(image).tolist() == [[[2, 16]]]


def test_fake__white_is_the_last_id() -> None:
    assert FakeTokenizer(vocab_size=10, stride=2).encode(torch.ones(1, 3, 2, 2)).item() == 9


def test_fake__refuses_sides_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="stride 8, got 8 x 12"):
        FakeTokenizer().encode(torch.rand(1, 3, 8, 12))


def test_fake__refuses_a_single_level() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 2 and stride 1, got 1 and 8"):
        FakeTokenizer(vocab_size=1)
