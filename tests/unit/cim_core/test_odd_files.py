"""Links that loop, paths that are too long, files that this user may not read: beside good pictures."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import NoUsableImageError, scan
from cim_core.data.sources import places, walk
from cim_core.errors import DataError
from tests.unit.cim_core.test_index import names, pack, picture, put, reasons

# Everything is imported before the rights are given up: the interpreter may lie in a folder of root's.
AS_NOBODY = """
import json, os, sys
from PIL import Image
from cim_core.data.index import scan
from cim_core.errors import DataError
Image.init()
if os.geteuid() == 0:
    os.setuid(65534)
told = {}
for name in sys.argv[2:]:
    try:
        index = scan(os.path.join(sys.argv[1], name))
        told[name] = [[e.name for e in index.entries], {s.path: s.reason for s in index.skipped}]
    except DataError as error:
        told[name] = str(error)
print(json.dumps(told))
"""
CLOSED = ["closed", "closed/inside", "closed/*.tar", "tars/a.tar", "tars/*.tar", "listed-not", "around"]


@pytest.fixture(scope="module")
def seen_by_nobody() -> tuple[Path, dict[str, Any]]:
    """What a user without rights is told of each place: names and reasons, or the sentence of the error."""
    root = Path(tempfile.mkdtemp(prefix="cim-odd-", dir="/tmp"))  # pytest's own folders are closed to others
    root.chmod(0o755)
    put(root / "mixed", {"good.png": picture(), "closed.png": picture(), "listed/a.png": picture()})
    put(root, {f"{place}/inside/a.png": picture() for place in ("closed", "listed-not", "around/deeper")})
    closed = [pack(root / place / "a.tar", {"a.png": picture()}) for place in ("mixed", "tars", "closed")]
    for file in (root / "mixed/closed.png", *closed):
        file.chmod(0)
    (root / "mixed/listed").chmod(0o644)  # as `chmod -R 644` leaves it: names can be listed, and no more
    (root / "closed").chmod(0o600)
    for folder in (root / "listed-not", root / "around/deeper"):
        folder.chmod(0o311)
    command = [sys.executable, "-c", AS_NOBODY, str(root), "mixed", *CLOSED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    subprocess.run(["chmod", "-R", "u+rwX", str(root)], check=True)
    shutil.rmtree(root)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A good picture beside a folder that goes down further than a path may be long."""
    put(tmp_path / "photos", {"good.png": picture()})
    root = os.open(tmp_path / "photos", os.O_RDONLY)
    here = root
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        if here != root:
            os.close(here)
        here = inner
    os.close(os.open("lost.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    os.close(root)
    yield tmp_path / "photos"
    # Neither pytest nor shutil gets down there.
    subprocess.run(["rm", "-rf", str(tmp_path / "photos")], check=True)


def test_folder__links_that_loop_are_broken_links(tmp_path: Path) -> None:
    root = put(tmp_path / "photos", {"good.png": picture(), "sub/good.png": picture()})
    (root / "loop.png").symlink_to("loop.png")
    (root / "one.png").symlink_to("sub/two.png")
    (root / "sub" / "two.png").symlink_to("../one.png")
    (root / "sub" / "up").symlink_to("..")
    (root / "shards.tar").symlink_to("shards.tar")
    index = scan(root)
    assert names(index) == ["good.png", "sub/good.png"]
    broken = "broken link or not a regular file"
    links = dict.fromkeys(("loop.png", "one.png", "sub/two.png", "shards.tar"), broken)
    assert reasons(index) == {**links, "sub/up": "link to a folder"}


@pytest.mark.parametrize(
    "name", ["loop", "loop/*.tar", "loop-*.tar", "loop/photos", "x" * 300, "x" * 300 + "/photos", "a**b.tar"]
)
def test_places__what_cannot_be_there_is_the_users_to_mend(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop-0.tar").symlink_to("loop-0.tar")
    with pytest.raises(DataError, match=r"^data\.uri: .*(loop|xxx|a\*\*b)"):
        places(str(tmp_path / name))


def test_places__braces_may_be_longer_than_a_name(tmp_path: Path) -> None:
    pack(tmp_path / "shard-007.tar", {"a.png": picture()})
    wanted = ",".join(f"{number:03}" for number in range(100))
    assert places(f"{tmp_path}/shard-{{{wanted}}}.tar") == [tmp_path / "shard-007.tar"]


def test_folder__deeper_than_a_path_may_be_long(deep: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.uri: the folder .*d{100}.* cannot be read: File name too long"
    ) as caught:
        scan(deep)
    assert len(str(caught.value)) < 1000


def test_folder__a_name_that_makes_the_path_too_long_is_skipped(tmp_path: Path) -> None:
    root = put(tmp_path / "photos", {"good.png": picture()})
    bottom = root
    while len(str(bottom)) < 3700:
        bottom /= "d" * 200
        bottom.mkdir()
    bottom /= "e" * (4000 - len(str(bottom)))
    bottom.mkdir()
    handle = os.open(bottom, os.O_RDONLY)
    os.close(os.open("f" * 200 + ".png", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    index = scan(root)
    os.unlink("f" * 200 + ".png", dir_fd=handle)
    os.close(handle)
    assert names(index) == ["good.png"]
    assert list(reasons(index).values()) == ["cannot be read: File name too long"]


def test_folder__more_folders_deep_than_python_calls(tmp_path: Path) -> None:
    """A walk that calls itself for each folder ends at a thousand."""
    here = os.open(put(tmp_path / "photos", {"good.png": picture()}), os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        assert names(scan(tmp_path / "photos")) == ["good.png"]
        with pytest.raises(DataError, match="pattern"):
            places(f"{tmp_path}/photos/**/*.tar")
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "photos")], check=True)


def test_folder__files_that_may_not_be_read_are_skipped_with_the_reason(
    seen_by_nobody: tuple[Path, dict[str, Any]],
) -> None:
    used, skipped = seen_by_nobody[1]["mixed"]
    assert used == ["good.png"]
    assert skipped == {
        "closed.png": "cannot be read: Permission denied",
        "listed/a.png": "cannot be read: Permission denied",
        "a.tar": "the tar file cannot be read to its end: Permission denied",
    }


@pytest.mark.parametrize("name", CLOSED)
def test_scan__a_place_that_may_not_be_read_is_the_users_to_mend(
    seen_by_nobody: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, told = seen_by_nobody
    assert told[name].startswith("data.uri: ")
    assert "cannot be read: Permission denied; make it readable" in told[name]
    assert f"{root}/{name.partition('/')[0]}" in told[name]


def test_walk__a_disk_that_fails_is_not_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> None:
        raise OSError(5, "Input/output error", str(path))

    _root, found = walk(str(put(tmp_path, {"good.png": picture()})))
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(found)
    assert not isinstance(caught.value, DataError)


def test_tar__an_archive_that_its_parser_dies_of_is_skipped_beside_good_pictures(tmp_path: Path) -> None:
    """Long-name headers in a row: tarfile calls itself for each one."""
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    (put(tmp_path, {"good.png": picture()}) / "nested.tar").write_bytes(
        header.tobuf(tarfile.GNU_FORMAT) * 3000
    )
    index = scan(tmp_path)
    assert names(index) == ["good.png"]
    assert reasons(index)["nested.tar"].startswith("the tar file cannot be read to its end: ")
    with pytest.raises(DataError, match=r"nested\.tar"):
        scan(tmp_path / "nested.tar")


@pytest.mark.parametrize(
    "content", ["nothing", "zeros", "a cut header", "a cut picture", "a picture of no size"]
)
def test_tar__an_only_one_that_is_empty_or_cut_is_the_users_to_mend(tmp_path: Path, content: str) -> None:
    whole = pack(tmp_path / "a.tar", {"a.png": picture(size=(40, 40))})
    data = whole.read_bytes()
    contents = {
        "nothing": b"",
        "zeros": bytes(10240),
        "a cut header": data[:300],
        "a cut picture": data[:900],
    }
    whole.write_bytes(contents.get(content, pack(tmp_path / "b.tar", {"a.png": b""}).read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar"):
        scan(whole)
    (tmp_path / "b.tar").unlink(missing_ok=True)
    with pytest.raises(NoUsableImageError):
        scan(tmp_path)


def test_picture__a_file_that_is_gone_while_training_is_named(tmp_path: Path) -> None:
    dataset = ImageDataset(scan(put(tmp_path, {"sub/good.png": picture()})), ViewConfig(image_size=4))
    (tmp_path / "sub" / "good.png").unlink()
    with pytest.raises(
        DataError, match=r"sub/good\.png was there when training began and cannot be read: No such file"
    ) as caught:
        dataset.picture(0)
    assert isinstance(caught.value.__cause__, OSError)
