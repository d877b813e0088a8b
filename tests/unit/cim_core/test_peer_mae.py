"""MAE against a full pass with attention masked, and against loops over patches."""

import math

import pytest
import torch
from torch import Tensor

from cim_core.config import MaskingConfig
from cim_core.data.dataset import Views
from cim_core.peers.base import PeerOutput
from cim_core.peers.mae import MAE
from tests.unit.cim_core.cim_models import TINY_VIT, peer_config, rng, tiny_peer, views_for

REGISTERS = {**TINY_VIT, "reg_tokens": 2}


def mae(**changes: object) -> MAE:
    model = tiny_peer(peer_config("mae", **changes))  # type: ignore[arg-type]
    assert isinstance(model, MAE)
    return model


def step(model: MAE, views: Views, *, seed: int = 0) -> PeerOutput:
    output = model(views, generator=rng(seed))
    assert isinstance(output, PeerOutput)
    return output


@pytest.mark.parametrize("options", [TINY_VIT, REGISTERS], ids=["class token", "with registers"])
def test_encode__is_a_full_pass_in_which_nobody_attends_to_masked_patches(options: dict[str, int]) -> None:
    model = mae(options=options).eval()
    views = views_for(model)
    output = step(model, views)
    images = model.normalise(output.clean_B3HW)
    prefix = model.enhancer.plan.num_prefix
    seen = torch.cat([torch.ones(3, prefix, dtype=torch.bool), ~output.mask_BN], dim=1)
    whole = model.backbone.forward_features(images, attn_mask=seen[:, None, None, :])
    encoded = model.encode(images, output.mask_BN)
    assert encoded.shape == (3, prefix + 16, 32)
    for image in range(3):
        torch.testing.assert_close(encoded[image], whole[image, seen[image]])


def test_masks__hide_three_quarters_of_every_image() -> None:
    model = mae()
    mask_BN = step(model, views_for(model, num_images=9)).mask_BN
    assert mask_BN.sum(dim=1).tolist() == [48] * 9
    assert model.num_visible == 16
    assert len({tuple(mask.tolist()) for mask in mask_BN}) == 9


def test_visible__are_the_places_that_are_not_masked_in_order() -> None:
    model = mae()
    mask_BN = step(model, views_for(model)).mask_BN
    for mask, places in zip(mask_BN, model.visible(mask_BN), strict=True):
        assert places.tolist() == [place for place, hidden in enumerate(mask.tolist()) if not hidden]


def test_loss__is_the_mean_square_of_masked_patches_found_one_by_one() -> None:
    model = mae(image_size=16)
    output = step(model, views_for(model, num_images=2))
    images = model.normalise(output.clean_B3HW)
    losses = []
    for image in range(2):
        for place in output.mask_BN[image].nonzero().flatten().tolist():
            patch, guess = (_patch(x[image], place) for x in (images, output.prediction))
            numbers = patch.flatten().tolist()
            mean = sum(numbers) / len(numbers)
            variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
            target = [(number - mean) / math.sqrt(variance + 1e-6) for number in numbers]
            squares = [(a - b) ** 2 for a, b in zip(guess.flatten().tolist(), target, strict=True)]
            losses.append(sum(squares) / len(squares))
    assert output.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_decoder__puts_visible_features_at_their_places_and_mask_tokens_elsewhere() -> None:
    """The decoder run by hand, on tokens that are put together one by one."""
    model = mae().eval()
    output = step(model, views_for(model, num_images=1))
    decoder = model.decoder
    embedded = decoder.embed(model.encode(model.normalise(output.clean_B3HW), output.mask_BN))[0]
    visible = iter(embedded[1:])
    tokens = [embedded[0]]
    for place, hidden in enumerate(output.mask_BN[0].tolist()):
        token = decoder.mask_token[0, 0] if hidden else next(visible)
        tokens.append(token + decoder.positions[0, place])
    hidden = decoder.norm(decoder.blocks(torch.stack(tokens)[None]))[0]
    for place in (0, 7, 8, 63):
        pixels = decoder.head(hidden[1 + place]).view(3, 4, 4)
        torch.testing.assert_close(_patch(output.prediction[0], place), pixels)


def test_positions__are_sines_and_cosines_of_row_and_column() -> None:
    """One frequency after the other from 1 down to 1/10000, as in the Transformer; no two places equal."""
    positions = mae().decoder.positions[0]
    quarter = 24 // 4
    for place in (0, 9, 63):
        for number, coordinate in enumerate(divmod(place, 8)):
            for band in range(quarter):
                angle = coordinate / 10_000 ** (band / quarter)
                at = number * quarter + band
                assert positions[place, at].item() == pytest.approx(math.sin(angle), abs=1e-5)
                assert positions[place, 2 * quarter + at].item() == pytest.approx(math.cos(angle), abs=1e-5)
    distances = torch.cdist(positions, positions) + torch.eye(64) * 9
    assert distances.min() > 0.1


def test_forward__what_a_masked_patch_shows_changes_the_target_alone() -> None:
    model = mae().eval()
    views = views_for(model)
    before = step(model, views)
    masked = before.mask_BN.view(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels = torch.where(masked[:, None], 200, views.pixels_B3HW)
    after = step(
        model, Views(pixels_B3HW=pixels, token_pixels_B3HW=views.token_pixels_B3HW, ids_B2=views.ids_B2)
    )
    assert torch.equal(after.prediction, before.prediction)
    assert after.loss != before.loss


def test_init__of_the_decoder_is_maes() -> None:
    """Xavier's bound is sqrt(6 / (inputs + outputs)); the encoder keeps the start that CIM gives it."""
    decoder = mae(options={"depth": 1, "embed_dim": 96, "num_heads": 2}).decoder
    weight = decoder.embed.weight
    bound = math.sqrt(6 / (96 + 24))
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert decoder.head.bias.abs().max() == 0


def test_columns__give_predicted_patches_the_contrast_of_the_original() -> None:
    model = mae(masking=MaskingConfig(min_ratio=0.5, max_ratio=0.5))
    output = step(model, views_for(model, num_images=1))
    columns = model.columns(output)
    assert list(columns) == ["original", "masked", "predicted"]
    for place, hidden in enumerate(output.mask_BN[0].tolist()):
        shown, original = _patch(columns["predicted"][0], place), _patch(output.clean_B3HW[0], place)
        if not hidden:
            assert torch.equal(shown, original)
            continue
        patch = _patch(model.normalise(output.clean_B3HW)[0], place)
        restored = _patch(output.prediction[0], place) * (patch.var() + 1e-6).sqrt() + patch.mean()
        pixels = (restored * model.std + model.mean).clamp(0, 1)
        torch.testing.assert_close(shown, pixels, atol=1e-5, rtol=1e-4)


def _patch(image_3HW: Tensor, place: int) -> Tensor:
    """The 4 x 4 pixels of a position."""
    side = image_3HW.shape[-1] // 4
    row, column = divmod(place, side)
    return image_3HW[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
