"""What is found in folders and tars, what is left out and why."""

import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cim_core.data import transforms
from cim_core.data.index import Index, NoUsableImageError, scan
from cim_core.data.sources import expand_braces
from cim_core.errors import DataError


def picture(kind: str = "PNG", *, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def names(index: Index) -> list[str]:
    return [entry.name for entry in index.entries]


def reasons(index: Index) -> dict[str, str]:
    return {s.path: s.reason for s in index.skipped}


def test_folder__any_depth_any_name_in_a_fixed_order(tmp_path: Path) -> None:
    files = ["b.png", "a/deep/er/x.jpg", "with space.png", "größe/日本.png", "A.PNG", "no_suffix"]
    index = scan(put(tmp_path, {name: picture() for name in files}))
    assert names(index) == sorted(files)
    assert index.classes == ()
    assert {e.label for e in index.entries} == {None}
    assert {(e.width, e.height) for e in index.entries} == {(9, 7)}


def test_folder__hidden_files_are_not_even_counted(tmp_path: Path) -> None:
    hidden = [".x.png", ".git/a.png", "a/.b/c.png", "a/._mac.jpg"]
    index = scan(put(tmp_path, {name: picture() for name in [*hidden, "seen.png"]}))
    assert (names(index), index.report()["counted"]) == (["seen.png"], 1)


def test_folder__broken_files_are_left_out_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1000)
    jpeg = picture("JPEG", size=(30, 30))
    index = scan(
        put(
            tmp_path,
            {
                "good.png": picture(),
                "empty.png": b"",
                "notes.txt": b"hello",
                "half.jpg": jpeg[: len(jpeg) - 300],
                "half.png": picture(size=(20, 20))[:100],
                "noise.jpg": jpeg[:20] + os.urandom(400),
                "bomb.png": picture(size=(100, 11)),
                "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            },
        )
    )
    assert names(index) == ["good.png"]
    why = reasons(index)
    assert why["empty.png"] == "empty file"
    assert why["notes.txt"].startswith("not an image of a known format")
    assert why["drawing.eps"].startswith("not an image of a known format")
    assert "100 x 11 pixels are more than the limit of 1000" in why["bomb.png"]
    assert "truncated" in why["half.jpg"]
    assert "truncated" in why["half.png"]
    assert "noise.jpg" in why
    report = index.report()
    assert (report["counted"], report["used"], len(report["skipped"])) == (8, 1, 7)


def test_folder__a_real_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A header that promises 2.5 billion pixels in a few hundred bytes."""
    data = bytearray(picture(size=(1, 1)))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(NoUsableImageError) as caught:
        scan(put(tmp_path, {"bomb.png": bytes(data)}))
    assert "2500000000 pixels" in caught.value.report["skipped"][0]["reason"]


def test_folder__links(tmp_path: Path) -> None:
    root = put(tmp_path / "root", {"real.png": picture(), "sub/x.png": picture()})
    put(tmp_path, {"outside.png": picture()})
    (root / "inside.png").symlink_to(root / "real.png")
    (root / "leaves.png").symlink_to(tmp_path / "outside.png")
    (root / "climbs.png").symlink_to("../outside.png")
    (root / "broken.png").symlink_to(root / "gone.png")
    (root / "loop").symlink_to(root)
    index = scan(root)
    assert names(index) == ["inside.png", "real.png", "sub/x.png"]
    assert reasons(index) == {
        "leaves.png": "link that leaves the folder",
        "climbs.png": "link that leaves the folder",
        "broken.png": "broken link or not a regular file",
        "loop": "link to a folder",
    }


def test_folder__a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(put(tmp_path, {"a.png": picture()}) / "pipe.png")
    assert reasons(scan(tmp_path)) == {"pipe.png": "broken link or not a regular file"}


def test_labels__every_usable_file_at_class_and_file(tmp_path: Path) -> None:
    index = scan(put(tmp_path, {"dog/2.png": picture(), "cat/1.png": picture(), "readme.txt": b"x"}))
    assert index.classes == ("cat", "dog")
    assert [(e.path, e.label) for e in index.entries] == [("cat/1.png", 0), ("dog/2.png", 1)]


@pytest.mark.parametrize("odd", ["x.png", "a/b/x.png"])
def test_labels__one_file_elsewhere_and_there_are_none(tmp_path: Path, odd: str) -> None:
    assert scan(put(tmp_path, {"cat/1.png": picture(), odd: picture()})).classes == ()


def test_tar__members_by_their_place(tmp_path: Path) -> None:
    files = {"./dog/2.png": picture(size=(4, 5)), "cat/größe 1.jpg": picture("JPEG"), "cat/.hidden": b"x"}
    tar = pack(tmp_path / "set.tar", files)
    index = scan(tar)
    assert names(index) == ["set.tar/cat/größe 1.jpg", "set.tar/dog/2.png"]
    assert [index.read(i) for i in range(2)] == [files["cat/größe 1.jpg"], files["./dog/2.png"]]
    assert (index.classes, [e.label for e in index.entries]) == (("cat", "dog"), [0, 1])


def test_tar__nothing_is_written_anywhere(tmp_path: Path) -> None:
    """Names that climb out of the archive are only names."""
    tar = pack(tmp_path / "in" / "set.tar", {"../../evil.png": picture(), "/abs/evil.png": picture()})
    index = scan(tar)
    assert [e.path for e in index.entries] == ["../../evil.png", "abs/evil.png"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tar]


def test_tar__links_repeated_names_and_long_names(tmp_path: Path) -> None:
    tar = tmp_path / "set.tar"
    long = "x" * 150 + "/" + "y" * 150 + ".png"
    pack(tar, {"a.png": picture(size=(3, 3)), long: picture()})
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        again = tarfile.TarInfo("a.png")
        again.size = len(picture(size=(5, 5)))
        archive.addfile(again, io.BytesIO(picture(size=(5, 5))))
    index = scan(tar)
    assert [(e.path, e.width) for e in index.entries] == [("a.png", 5), (long, 9)]
    assert reasons(index) == {
        "set.tar/link.png": "link, device or sparse file inside a tar",
        "set.tar/a.png": "replaced by a later member of the same name",
    }


def test_tar__cut_off_and_damaged(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(size=(40, 40)) for i in range(4)}
    whole = pack(tmp_path / "whole.tar", files).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    third = scan(tmp_path / "whole.tar").entries[2].offset
    (tmp_path / "damaged.tar").write_bytes(whole[: third - 512] + b"\xff" * 512 + whole[third:])
    cut, damaged = scan(tmp_path / "cut.tar"), scan(tmp_path / "damaged.tar")
    assert 0 < len(cut) < 4
    assert any("cut.tar" in path for path in reasons(cut))
    assert len(damaged) == 2
    assert "damaged header" in reasons(damaged)["damaged.tar"]


def test_shards__pattern_braces_and_folder_give_the_same_images(tmp_path: Path) -> None:
    for i in range(3):
        pack(tmp_path / f"s-{i:03}.tar", {f"cat/{i}.png": picture(), f"dog/{i}.png": picture()})
    expected = [f"s-{i:03}.tar/{c}/{i}.png" for i in range(3) for c in ("cat", "dog")]
    for uri in ("s-*.tar", "s-{000..002}.tar", "s-{000,001,002}.tar", ""):
        index = scan(tmp_path / uri)
        assert (names(index), index.classes) == (expected, ("cat", "dog"))
    assert names(scan(tmp_path / "s-{001..002}.tar")) == expected[2:]


def test_braces__written_out() -> None:
    assert list(expand_braces("a{08..10}b{x,y}")) == [f"a{i}b{c}" for i in ("08", "09", "10") for c in "xy"]


@pytest.mark.parametrize("pattern", ["{0..9}" * 6, "{0..100000}", "{,}" * 1300, "{1..999999999999}"])
def test_braces__that_stand_for_too_much_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="at most 100000 shards"):
        list(expand_braces(f"/x/{pattern}.tar"))
    assert len(list(expand_braces("{0..99999}"))) == 100_000


def test_json__round_trip_and_another_root(tmp_path: Path) -> None:
    put(tmp_path / "one", {"cat/1.png": picture(), "dog/2.png": picture("JPEG"), "x.txt": b"no"})
    index = scan(tmp_path / "one")
    assert Index.from_json(index.to_json()) == index
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Index.from_json(index.to_json(), root=tmp_path / "two")
    assert moved.read(0) == picture()


def test_json__names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture())
    index = scan(tmp_path)
    again = Index.from_json(index.to_json().encode().decode())
    assert (again, again.read(0)) == (index, picture())


def test_scan__same_result_with_any_number_of_threads(tmp_path: Path) -> None:
    put(tmp_path, {f"{i}.png": picture(size=(i + 1, 3)) if i % 3 else b"no" for i in range(20)})
    assert scan(tmp_path, threads=1) == scan(tmp_path, threads=7)


def test_scan__tells_its_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    put(tmp_path, {f"{i}.png": picture(size=(1, 1)) for i in range(600)})
    scan(tmp_path, on_progress=lambda done, found: seen.append((done, found)))
    assert seen == [(512, 600), (600, 600)]


def test_scan__nothing_usable_lists_reasons(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": b"x", "b.png": b""})
    with pytest.raises(
        NoUsableImageError, match=r"none of the 2 files.*a\.txt: not an image.*b\.png: empty"
    ) as caught:
        scan(tmp_path)
    assert caught.value.report["used"] == 0
    assert len(caught.value.report["skipped"]) == 2


def test_scan__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NoUsableImageError, match="holds no files"):
        scan(tmp_path)
    with pytest.raises(DataError, match=r"data\.uri: .*gone does not exist"):
        scan(tmp_path / "gone")
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "gone-*.tar")
    put(tmp_path, {"x.tar.gz": b"\x1f\x8b123"})
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        scan(tmp_path / "x.tar.gz")
