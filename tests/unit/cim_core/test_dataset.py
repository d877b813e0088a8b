"""Pictures to RGB, random crops, views and the loader."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from cim_core.data.dataset import ImageDataset, ViewConfig, collate
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.data.sampler import SampleId
from cim_core.data.transforms import Box, centre_square, decode, random_box
from cim_core.errors import ConfigError, DataError
from cim_core.seeding import generator_for
from tests.unit.cim_core.tiny import write_images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_colour(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    colours = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return tuple(colours[0].tolist())


GREY_16 = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
HALF_CLEAR = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
PALETTE = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(GREY_16), (0x80, 0x80, 0x80)),
        (encoded(GREY_16, "TIFF"), (0x80, 0x80, 0x80)),
        (encoded(PALETTE), (10, 200, 30)),
        (encoded(PALETTE, "GIF"), (10, 200, 30)),
        (encoded(HALF_CLEAR), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255))), (200, 0, 0)),
        (encoded(Image.new("LA", (4, 4), (50, 0))), (255, 255, 255)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), (128, 128, 128)),
        (encoded(Image.new("F", (4, 4), 77.0), "TIFF"), (77, 77, 77)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "BMP"), (9, 8, 7)),
    ],
)
def test_decode__every_mode_becomes_rgb(data: bytes, expected: tuple[int, ...]) -> None:
    assert one_colour(data) == expected


def test_decode__cmyk_jpeg_keeps_its_colour() -> None:
    jpeg = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    r, g, b = np.asarray(decode(jpeg))[8, 8].tolist()
    assert r > 230
    assert g < 25
    assert b < 25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode__exif_orientation_is_applied(orientation: int) -> None:
    """Against Pillow's own `exif_transpose`, on a picture without symmetry."""
    from_noise = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(from_noise), exif=exif)
    expected = np.asarray(_upright(data))
    assert np.array_equal(np.asarray(decode(data)), expected)
    assert (expected.shape[:2] == (5, 3)) == (orientation >= 5)


def _upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def test_box__stays_inside_with_the_promised_area_and_ratio() -> None:
    boxes = [random_box((300, 200), crop_min=0.2, generator=generator_for(0, "t", i)) for i in range(2000)]
    areas = np.array([b.width * b.height / 60_000 for b in boxes])
    ratios = np.array([math.log(b.width / b.height) for b in boxes])
    assert all(b.left >= 0 and b.top >= 0 for b in boxes)
    assert all(b.left + b.width <= 300 and b.top + b.height <= 200 for b in boxes)
    assert 0.195 < areas.min() < 0.22
    assert np.abs(ratios).max() < math.log(4 / 3) + 0.02
    assert {b.left for b in boxes} >= {0, 1}
    assert max(b.left + b.width for b in boxes) == 300


def test_box__distribution_is_that_of_torchvision() -> None:
    """Means of area and of left edge over 4000 draws, within 4 standard errors of torchvision's."""
    ours = [random_box((90, 60), crop_min=0.08, generator=generator_for(1, "t", i)) for i in range(4000)]
    blank = torch.empty(3, 60, 90)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [v2.RandomResizedCrop.get_params(blank, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    for a, b in (
        ([x.width * x.height for x in ours], [h * w for _, _, h, w in theirs]),
        ([x.left for x in ours], [left for _, left, _, _ in theirs]),
        ([x.top for x in ours], [top for top, _, _, _ in theirs]),
    ):
        error = math.hypot(np.std(a) / math.sqrt(4000), np.std(b) / math.sqrt(4000))
        assert abs(np.mean(a) - np.mean(b)) < 4 * error


@pytest.mark.parametrize(("size", "expected"), [((100, 5), Box(46, 0, 7, 5)), ((1, 50), Box(0, 24, 1, 1))])
def test_box__long_thin_pictures_give_their_middle(size: tuple[int, int], expected: Box) -> None:
    assert random_box(size, crop_min=0.9, generator=generator_for(0, "t")) == expected


def test_centre__largest_square() -> None:
    assert centre_square((9, 4)) == Box(2, 0, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), side=24)


def dataset(
    folder: Path, *, token_size: int | None = None, seed: int = 0, cache_bytes: int = 0
) -> ImageDataset:
    views = ViewConfig(image_size=16, token_size=token_size, crop_min=0.2, seed=seed)
    return ImageDataset(scan(folder), views, cache_bytes=cache_bytes)


def test_views__one_crop_at_two_sizes_by_pillow(folder: Path) -> None:
    """Each view recomputed from the file: crop, resize, flip."""
    data = dataset(folder, token_size=8)
    flips = set()
    for epoch in range(8):
        item = data[SampleId(epoch, 3)]
        generator = generator_for(0, "augment", epoch, 3)
        box = random_box((24, 24), crop_min=0.2, generator=generator)
        flip = torch.rand((), generator=generator).item() < 0.5
        flips.add(flip)
        crop = data.picture(3).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        for tensor, side, filter_ in (
            (item.pixels_B3HW, 16, Image.Resampling.BICUBIC),
            (item.token_pixels_B3HW, 8, Image.Resampling.LANCZOS),
        ):
            expected = np.asarray(crop.resize((side, side), filter_)).transpose(2, 0, 1)
            assert tensor.dtype == torch.uint8
            assert np.array_equal(tensor[0].numpy(), expected[:, :, ::-1] if flip else expected)
    assert flips == {True, False}


def test_views__depend_on_seed_epoch_and_image_alone(folder: Path) -> None:
    data = dataset(folder)
    first = data[SampleId(1, 2)].pixels_B3HW
    assert torch.equal(data[SampleId(1, 2)].pixels_B3HW, first)
    for other in (data[SampleId(2, 2)], data[SampleId(1, 3)], dataset(folder, seed=1)[SampleId(1, 2)]):
        assert not torch.equal(other.pixels_B3HW, first)


def test_views__without_token_size_there_is_no_second_view(folder: Path) -> None:
    assert dataset(folder)[SampleId(0, 0)].token_pixels_B3HW.shape == (1, 3, 0, 0)


def test_views__split_and_collate_are_inverse(folder: Path) -> None:
    data = dataset(folder, token_size=8)
    batch = collate([data[SampleId(0, place)] for place in range(6)])
    assert batch.ids_B2.tolist() == [[0, place] for place in range(6)]
    assert [len(part) for part in batch.split(3)] == [2, 2, 2]
    again = collate(batch.split(3))
    assert torch.equal(again.pixels_B3HW, batch.pixels_B3HW)
    assert torch.equal(again.token_pixels_B3HW, batch.token_pixels_B3HW)
    with pytest.raises(AssertionError, match="equal parts"):
        batch.split(4)


def test_views__portions_are_of_one_size_but_the_last(folder: Path) -> None:
    data = dataset(folder, token_size=8)
    batch = collate([data[SampleId(0, place)] for place in range(5)])
    found = batch.portions(2)
    assert [part.ids_B2[:, 1].tolist() for part in found] == [[0, 1], [2, 3], [4]]
    for at, part in zip((0, 2, 4), found, strict=True):
        assert torch.equal(part.pixels_B3HW, batch.pixels_B3HW[at : at + 2])
        assert torch.equal(part.token_pixels_B3HW, batch.token_pixels_B3HW[at : at + 2])
    assert [len(part) for part in batch.portions(9)] == [5]


def test_cache__changes_no_view_and_respects_its_bound(folder: Path) -> None:
    """24 x 24 pixels of 4 bytes: room for exactly three pictures."""
    plain, cached = dataset(folder), dataset(folder, cache_bytes=3 * 24 * 24 * 4)
    for _ in range(2):
        for place in range(len(plain)):
            key = SampleId(0, place)
            assert torch.equal(plain[key].pixels_B3HW, cached[key].pixels_B3HW)
    assert cached.picture(2) is cached.picture(2)
    assert cached.picture(3) is not cached.picture(3)
    assert len(pickle.dumps(cached)) < 4000, "pictures must not travel to the loader's processes"


def test_eval_image__is_the_middle_and_always_the_same(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    data = ImageDataset(scan(tmp_path), ViewConfig(image_size=4))
    assert torch.equal(data.eval_image(0), torch.full((3, 4, 4), 255, dtype=torch.uint8))


def test_label__of_a_set_without_classes(tmp_path: Path, folder: Path) -> None:
    assert [dataset(folder).label(place) for place in (0, 9)] == [0, 1]
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"has no labels.*CLASS/FILE"):
        ImageDataset(scan(tmp_path), ViewConfig(image_size=4)).label(0)


def test_picture__changed_after_the_scan(tmp_path: Path) -> None:
    data = dataset(write_images(tmp_path))
    (tmp_path / "class0" / "000.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"class0/000\.png was changed after training began"):
        data[SampleId(0, 0)]
    (tmp_path / "class0" / "000.png").unlink()
    with pytest.raises(DataError, match=r"class0/000\.png was there when training began and cannot be read"):
        data[SampleId(0, 0)]


def test_loader__threads_give_the_stream_from_any_step(folder: Path) -> None:
    data = dataset(folder)
    loader = ImageLoader(data, batch_size=4)
    whole = [views.ids_B2.tolist() for views in loader.steps(0, 7)]
    assert whole == [[list(s) for s in loader.stream.batch(step)] for step in range(7)]
    assert [views.ids_B2.tolist() for views in loader.steps(3, 7)] == whole[3:]
    assert list(loader.steps(7, 7)) == []
    for views in loader.steps(0, 2):
        for place, (epoch, index) in enumerate(views.ids_B2.tolist()):
            assert torch.equal(views.pixels_B3HW[place], data[SampleId(epoch, index)].pixels_B3HW[0])


def test_loader__ranks_share_each_batch(folder: Path) -> None:
    loaders = [ImageLoader(dataset(folder), batch_size=6, rank=r, world_size=3) for r in range(3)]
    parts = [next(loader.steps(2, 3)).ids_B2 for loader in loaders]
    assert torch.cat(parts).tolist() == [list(s) for s in loaders[0].stream.batch(2)]


def test_loader__closed_early_ends_its_threads(folder: Path) -> None:
    steps = ImageLoader(dataset(folder), batch_size=4).steps(0, 1000)
    next(steps)
    steps.close()
    assert list(steps) == []


def test_loader__an_unreadable_file_reaches_the_caller(tmp_path: Path) -> None:
    data = dataset(write_images(tmp_path))
    (tmp_path / "class0" / "000.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match="changed after training began"):
        list(ImageLoader(data, batch_size=10).steps(0, 1))


def test_loader__batch_that_cannot_be_divided(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"10 images cannot be divided equally among 4 parts"):
        ImageLoader(dataset(folder), batch_size=10, accumulation=2, world_size=2)


@pytest.mark.slow
def test_loader__processes_give_the_same_batches_and_leave_the_generator_alone(folder: Path) -> None:
    data = dataset(folder, token_size=8)
    before = torch.get_rng_state()
    threads = list(ImageLoader(data, batch_size=4).steps(2, 6))
    processes = list(ImageLoader(data, batch_size=4, num_workers=1).steps(2, 6))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(threads, processes, strict=True):
        assert torch.equal(a.ids_B2, b.ids_B2)
        assert torch.equal(a.pixels_B3HW, b.pixels_B3HW)
        assert torch.equal(a.token_pixels_B3HW, b.token_pixels_B3HW)
