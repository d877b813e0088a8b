import numpy as np
import pytest
import torch
from PIL import Image

from cim_core.samples import sample_grid
from tests.unit.cim_core.cim_models import model_config, rng, tiny_cim, views_for

HEADER, GAP, CELL = 24, 4, 128


def cell(picture: Image.Image, *, row: int, column: int) -> np.ndarray:
    top, left = HEADER + row * (CELL + GAP), GAP + column * (CELL + GAP)
    array: np.ndarray = np.asarray(picture)[top : top + CELL, left : left + CELL]
    return array


@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_sample_grid__has_four_columns_and_at_most_eight_rows(objective: str) -> None:
    cim = tiny_cim(model_config(objective=objective))
    for num_images, rows in ((2, 2), (11, 8)):
        picture = sample_grid(cim, views_for(cim, num_images=num_images), generator=rng())
        assert picture.size == (4 * (CELL + GAP) + GAP, HEADER + rows * (CELL + GAP))


def test_sample_grid__cells_hold_what_the_titles_say() -> None:
    cim = tiny_cim().eval()
    views = views_for(cim)
    output = cim(views, generator=rng(4))
    picture = sample_grid(cim, views, generator=rng(4))
    original = views.pixels_B3HW[1].permute(1, 2, 0).numpy()
    corrupted = (output.corrupted_B3HW[1] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(cell(picture, row=1, column=0)[::4, ::4], original)
    assert np.abs(cell(picture, row=1, column=2)[::4, ::4] - corrupted).max() <= 1
    masked = cell(picture, row=1, column=1)[::4, ::4].reshape(4, 8, 4, 8, 3)
    hidden = (masked == 128).all(axis=(1, 3, 4)).reshape(-1)
    assert hidden.tolist() == output.mask_BN[1].tolist()


def test_sample_grid__every_column_has_a_title() -> None:
    cim = tiny_cim()
    header = np.asarray(sample_grid(cim, views_for(cim), generator=rng()))[:HEADER]
    for column in range(4):
        left = GAP + column * (CELL + GAP)
        assert (header[:, left : left + CELL] < 100).any()


@pytest.mark.parametrize("training", [True, False])
def test_sample_grid__leaves_mode_and_weights_alone(*, training: bool) -> None:
    cim = tiny_cim(model_config(name="test_resnet")).train(training)
    before = {key: value.clone() for key, value in cim.state_dict().items()}
    sample_grid(cim, views_for(cim), generator=rng())
    assert cim.training is training
    assert all(torch.equal(before[key], value) for key, value in cim.state_dict().items())
