"""The bundled tiles: what the script makes, balanced, and with no pixel in both sets."""

import io
import tarfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution, version
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from scripts import make_demo_tiles as tiles


def members(split: str) -> dict[str, bytes]:
    with tarfile.open(tiles.PHOTOS / f"{split}.tar") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def test_tiles__script_rebuilds_both_files_byte_for_byte() -> None:
    try:
        distribution("scikit-image")
    except PackageNotFoundError:
        pytest.skip("scikit-image is not installed, so the pictures are not here")
    for name, content in tiles.build().items():
        assert (tiles.PHOTOS / name).read_bytes() == content, name


@pytest.mark.parametrize("source", tiles.SOURCES, ids=lambda s: s.name)
def test_tiles__train_and_val_share_no_pixel(source: tiles.Source) -> None:
    folder = Path(str(distribution("scikit-image").locate_file("skimage/data")))
    image = tiles.load(source, folder)
    boxes = tiles.boxes_of(source, width=image.width, height=image.height)
    assert sum(tiles.overlap(a, b) for a, b in product(boxes["train"], boxes["val"])) == 0
    for box in boxes["train"] + boxes["val"]:
        assert tiles.overlap(box, (0, 0, image.width, image.height)) == (box[2] - box[0]) ** 2


def test_overlap__counts_shared_pixels() -> None:
    assert tiles.overlap((0, 0, 4, 4), (3, 2, 9, 9)) == 2
    assert tiles.overlap((0, 0, 4, 4), (4, 0, 8, 4)) == 0


@pytest.mark.parametrize(("split", "count"), [("train", tiles.NUM_TRAIN), ("val", tiles.NUM_VAL)])
def test_tiles__are_balanced_real_pictures_of_one_size(split: str, count: int) -> None:
    content = members(split)
    assert Counter(name.split("/")[0] for name in content) == {s.name: count for s in tiles.SOURCES}
    for name, data in content.items():
        with Image.open(io.BytesIO(data)) as image:
            assert (image.size, image.mode, image.format) == ((tiles.TILE, tiles.TILE), "RGB", "JPEG"), name


def test_tiles__stay_small() -> None:
    assert sum(p.stat().st_size for p in tiles.PHOTOS.iterdir()) <= 4_000_000


def test_sources__names_picture_and_release_of_each_class() -> None:
    text = (tiles.PHOTOS / "SOURCES.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for source in tiles.SOURCES:
        assert source.file in rows[source.name]
        assert "CC0" in rows[source.name] or "public domain" in rows[source.name]
    assert f"scikit-image {version('scikit-image')}" in text
