"""Rebuild examples/photos/{train,val}.tar, byte for byte, from pictures inside scikit-image.

Each picture is cut into 3 x 3 cells. Three cells, one in each row and column, give the val
tiles; train tiles lie wholly outside them, so the two sets share no pixel. A class is the
picture that a tile was cut from. Sources and licences: examples/photos/SOURCES.md.
"""

import argparse
import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from PIL import Image

PHOTOS = Path(__file__).resolve().parent.parent / "examples" / "photos"
TILE = 96  # pixels a side
SIDES = (96, 112, 128, 144, 160)  # of the square that becomes a tile; never enlarged
GRID_STEP = 8  # pixels between candidate squares
JPEG_QUALITY = 88
NUM_TRAIN, NUM_VAL = 32, 12  # tiles a class

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture of scikit-image's data folder, and what of it is used."""

    name: str
    file: str
    crop: Box | None = None
    size: tuple[int, int] | None = None  # after cropping, where the original is too large for a tile
    val_columns: tuple[int, int, int] = (2, 0, 1)  # the val cell of each row of cells


SOURCES = (
    Source(name="astronaut", file="astronaut.png"),
    Source(name="brick", file="brick.png"),
    Source(name="camera", file="camera.png"),
    Source(name="chelsea", file="chelsea.png"),
    Source(name="coffee", file="coffee.png"),
    Source(name="grass", file="grass.png"),
    Source(name="gravel", file="gravel.png"),
    Source(name="hubble", file="hubble_deep_field.jpg"),
    Source(name="retina", file="retina.jpg", crop=(206, 206, 1206, 1206), size=(640, 640)),
    Source(name="rocket", file="rocket.jpg"),
)


def val_cells(source: Source, *, width: int, height: int) -> list[Box]:
    """The three cells that belong to val, one in each row."""
    xs = [width * i // 3 for i in range(4)]
    ys = [height * i // 3 for i in range(4)]
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r, c in enumerate(source.val_columns)]


def overlap(a: Box, b: Box) -> int:
    """Shared area, pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def candidates(area: Box, *, forbidden: Sequence[Box] = ()) -> list[Box]:
    """Squares inside `area` that touch no forbidden box, in an order that looks random and never changes."""
    boxes = [
        (x, y, x + side, y + side)
        for side in SIDES
        for x in range(area[0], area[2] - side + 1, GRID_STEP)
        for y in range(area[1], area[3] - side + 1, GRID_STEP)
        if not any(overlap((x, y, x + side, y + side), box) for box in forbidden)
    ]
    return sorted(boxes, key=lambda box: hashlib.sha256(repr(box).encode()).digest())


def spread(boxes: Sequence[Box], count: int) -> list[Box]:
    """Pick `count` boxes that overlap as little as a greedy choice allows."""
    taken: list[Box] = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        for box in boxes:
            area = (box[2] - box[0]) ** 2
            if len(taken) < count and all(overlap(box, other) <= share * area for other in taken):
                taken.append(box)
    if len(taken) < count:
        raise ValueError(f"only {len(taken)} of {count} tiles fit; use a larger picture")
    return sorted(taken)


def boxes_of(source: Source, *, width: int, height: int) -> dict[str, list[Box]]:
    """Where the tiles of each split are cut."""
    cells = val_cells(source, width=width, height=height)
    train = spread(candidates((0, 0, width, height), forbidden=cells), NUM_TRAIN)
    val = [box for cell in cells for box in spread(candidates(cell), NUM_VAL // len(cells))]
    return {"train": train, "val": val}


def load(source: Source, folder: Path) -> Image.Image:
    """The picture, RGB, cropped and reduced."""
    with Image.open(folder / source.file) as picture:
        image = picture.convert("RGB").crop(source.crop) if source.crop else picture.convert("RGB")
    return image.resize(source.size, Image.Resampling.LANCZOS) if source.size else image


def jpeg(image: Image.Image, box: Box) -> bytes:
    """One tile, encoded."""
    tile = image.crop(box).resize((TILE, TILE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    tile.save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return data.getvalue()


def tiles(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (split, CLASS/FILE, bytes) of every tile."""
    for source in SOURCES:
        image = load(source, folder)
        for split, boxes in boxes_of(source, width=image.width, height=image.height).items():
            for number, box in enumerate(boxes):
                yield split, f"{source.name}/{number:02d}.jpg", jpeg(image, box)


def tar_bytes(members: dict[str, bytes]) -> bytes:
    """A plain tar with nothing in it that depends on who made it or when."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def build() -> dict[str, bytes]:
    """The bytes of train.tar and val.tar; `PackageNotFoundError` without scikit-image."""
    # Located by its metadata: importing skimage would load scipy for nothing.
    folder = Path(str(distribution("scikit-image").locate_file("skimage/data")))
    splits: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    for split, name, content in tiles(folder):
        splits[split][name] = content
    return {f"{split}.tar": tar_bytes(members) for split, members in splits.items()}


def main() -> int:
    """Write both files, or with --check compare them; status 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is there")
    check = parser.parse_args().check
    status = 0
    for name, content in build().items():
        path = PHOTOS / name
        if not check:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            print(f"{path} is not what {Path(__file__).name} makes", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
