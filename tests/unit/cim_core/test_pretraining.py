from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cim_core.config import ModelConfig
from cim_core.pretraining import Output, Pretraining, build, greyed, on_pixels
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core.cim_models import model_config, peer_config, rng, tiny_cim, tiny_peer

MASK = torch.tensor([[True, False, False, False], [False, False, True, True]])


class Bare(Pretraining):
    """A method that does nothing in a step."""

    def forward(self, views: object, *, generator: torch.Generator) -> Output:
        raise NotImplementedError

    def columns(self, output: object) -> dict[str, Tensor]:
        raise NotImplementedError


def test_on_pixels__is_the_mask_at_each_pixels_cell() -> None:
    found = on_pixels(MASK, 2, 6)
    assert found.shape == (2, 1, 6, 6)
    assert found.dtype == torch.float32
    expected = [[[float(mask[y // 3 * 2 + x // 3]) for x in range(6)] for y in range(6)] for mask in MASK]
    assert found.squeeze(1).tolist() == expected


def test_greyed__is_half_grey_where_masked_and_the_image_elsewhere() -> None:
    images = torch.rand(2, 3, 6, 6, generator=rng())
    found = greyed(images, MASK, 2)
    for image, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        masked = bool(MASK[image, y // 3 * 2 + x // 3])
        expected = [0.5] * 3 if masked else images[image, :, y, x].tolist()
        assert found[image, :, y, x].tolist() == expected


@pytest.mark.parametrize("lacking", ["forward", "columns"])
def test_pretraining__a_method_has_a_step_and_pictures(lacking: str) -> None:
    kept = {name: getattr(Bare, name) for name in ("forward", "columns") if name != lacking}
    with pytest.raises(TypeError, match=f"abstract method '?{lacking}"):
        type("Half", (Pretraining,), kept)(peer_config("mae"))
    assert Bare(peer_config("mae")).grid == 8


def test_tokenizer__where_a_method_has_none() -> None:
    mae = tiny_peer(peer_config("mae"))
    assert mae.frozen is None
    assert mae.token_size is None
    with pytest.raises(AssertionError, match="mae has no tokenizer"):
        _ = mae.tokenizer
    mae.double()
    assert {p.dtype for p in mae.parameters()} == {torch.float64}


def test_tokenizer__may_be_no_module_of_torch() -> None:
    fake = FakeTokenizer(vocab_size=16, stride=4)
    plain = SimpleNamespace(encode=fake.encode, decode=fake.decode, vocab_size=16, stride=4, is_fake=False)
    cim = tiny_cim(tokenizer=plain).double()
    assert cim.frozen is plain
    assert cim.tokenizer is plain
    assert cim.token_size == 16


def test_build__gives_the_tokenizer_to_a_method_that_uses_one_alone() -> None:
    given: list[tuple[object, ...]] = []

    def kind(config: ModelConfig, *rest: object) -> Bare:
        given.append(rest)
        return Bare(config)

    fake = FakeTokenizer(vocab_size=16, stride=4)
    build(kind, model_config(), fake, seed=0)
    build(kind, peer_config("mae"), None, seed=0)
    assert given == [(fake,), ()]
