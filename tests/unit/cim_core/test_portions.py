import pytest
import torch
from torch import Tensor

from cim_core.config import TokenizerConfig
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.portions import PORTION_PIXELS, in_portions
from tests.unit.cim_core.cim_models import rng


@pytest.mark.parametrize(("num_images", "side", "sizes"), [(9, 64, [4, 4, 1]), (2, 200, [1, 1]), (5, 8, [5])])
def test_in_portions__what_the_caches_hold_in_order(num_images: int, side: int, sizes: list[int]) -> None:
    given: list[int] = []

    def run(part: Tensor) -> Tensor:
        given.append(len(part))
        return part + 1

    found = in_portions(run, torch.arange(num_images), side=side)
    assert given == sizes
    assert found.tolist() == list(range(1, num_images + 1))
    assert all(size == 1 or size * side**2 <= PORTION_PIXELS for size in sizes)


def test_in_portions__another_device_gets_all_at_once() -> None:
    given: list[Tensor] = []
    x = torch.empty(9, 3, 64, 64, device="meta")
    assert in_portions(lambda part: given.append(part) or part, x, side=64) is x  # type: ignore[func-returns-value]
    assert len(given) == 1


def test_in_portions__a_tokenizer_says_and_paints_what_it_does_at_once() -> None:
    vae = DiscreteVAE(TokenizerConfig(image_size=64, width=4, vocab_size=16), generator=rng()).eval()
    images = torch.rand(9, 3, 64, 64, generator=rng(1))
    tokens = vae.encode(images)
    assert torch.equal(in_portions(vae.encode, images, side=64), tokens)
    assert torch.allclose(in_portions(vae.decode, tokens, side=64), vae.decode(tokens), atol=1e-6)
