"""SimMIM against loops over pixels and squares."""

import pytest
import torch

from cim_core.config import MaskingConfig
from cim_core.data.dataset import Views
from cim_core.peers.base import PeerOutput
from cim_core.peers.simmim import SimMIM
from tests.unit.cim_core.cim_models import peer_config, rng, tiny_peer, views_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def simmim(**changes: object) -> SimMIM:
    model = tiny_peer(peer_config("simmim", **changes))  # type: ignore[arg-type]
    assert isinstance(model, SimMIM)
    return model


def step(model: SimMIM, views: Views, *, seed: int = 0) -> PeerOutput:
    output = model(views, generator=rng(seed))
    assert isinstance(output, PeerOutput)
    return output


def test_loss__is_the_mean_error_of_masked_pixels_found_one_by_one() -> None:
    model = simmim(image_size=16)
    views = views_for(model, num_images=2)
    output = step(model, views)
    errors = []
    for image in range(2):
        for y in range(16):
            for x in range(16):
                if output.mask_BN[image, 4 * (y // 4) + x // 4]:
                    for c in range(3):
                        target = (int(views.pixels_B3HW[image, c, y, x]) / 255 - MEAN[c]) / STD[c]
                        errors.append(abs(output.prediction[image, c, y, x].item() - target))
    assert output.loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_prediction__is_one_linear_layer_of_each_position() -> None:
    """Pixel (y, x) of channel c of a patch of p pixels is output c * p * p + y * p + x of its feature."""
    model = simmim()
    views = views_for(model, num_images=1)
    output = step(model, views)
    features = model.encode(model.normalise(output.clean_B3HW), output.mask_BN)
    weight, bias = model.head.proj.weight.flatten(1), model.head.proj.bias
    assert bias is not None
    for row, column in ((0, 0), (3, 5), (7, 7)):
        made = weight @ features[0, 8 * row + column] + bias
        patch = output.prediction[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(made.view(3, 4, 4), patch)


def test_forward__what_a_masked_patch_shows_changes_the_target_alone() -> None:
    model = simmim().eval()
    views = views_for(model)
    before = step(model, views)
    masked = before.mask_BN.view(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels = torch.where(masked[:, None], 255 - views.pixels_B3HW, views.pixels_B3HW)
    after = step(
        model, Views(pixels_B3HW=pixels, token_pixels_B3HW=views.token_pixels_B3HW, ids_B2=views.ids_B2)
    )
    assert torch.equal(after.prediction, before.prediction)
    assert after.loss != before.loss


def test_masks__are_whole_squares_of_the_unit() -> None:
    masking = MaskingConfig(unit=8)
    mask_BN = simmim(masking=masking).draw_mask(20, rng())
    squares = mask_BN.view(20, 4, 2, 4, 2).float().mean(dim=(2, 4))
    assert set(squares.flatten().tolist()) == {0.0, 1.0}
    assert squares.sum(dim=(1, 2)).tolist() == [round(0.6 * 16)] * 20
    assert len({tuple(mask.tolist()) for mask in mask_BN}) > 10


@pytest.mark.parametrize(
    ("image_size", "patch_size", "unit"),
    [(224, 16, 32), (192, 16, 32), (64, 8, 8), (128, 8, 16), (128, 16, 16), (32, 16, 16), (65, 13, 13)],
)
def test_unit__is_the_papers_32_pixels_at_its_sizes_and_smaller_below(
    image_size: int, patch_size: int, unit: int
) -> None:
    config = peer_config("simmim", image_size=image_size, patch_size=patch_size)
    assert config.resolved.masking.unit == unit


def test_columns__show_the_prediction_in_masked_squares_and_else_the_original() -> None:
    model = simmim()
    output = step(model, views_for(model))
    columns = model.columns(output)
    assert list(columns) == ["original", "masked", "predicted"]
    masked = (
        output.mask_BN.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    )
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    seen = (output.prediction * std + mean).clamp(0, 1)
    assert torch.equal(columns["predicted"][~masked], output.clean_B3HW[~masked])
    torch.testing.assert_close(columns["predicted"][masked], seen[masked])
    assert (columns["masked"][masked] == 0.5).all()
