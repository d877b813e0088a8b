"""What a submit can know of the addresses of data."""

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from service.contracts.allowed import EVERYTHING, allowed_by, prefixes_in
from service.contracts.parsing import parse
from service.jobs import places
from service.jobs.estimate import _num_files
from service.jobs.looks import Looks
from service.jobs.uris import judge
from tests.unit.service.test_parsing import evaluate, pretrain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images at some depth, two shards, an encoder, an empty folder, one with hidden files alone."""
    for name in ("images/a/b/one.png", "shard-000.tar", "shard-001.tar", "hidden/.DS_Store", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    (tmp_path / "encoder").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "encoder" / name).touch()
    return tmp_path


def found(
    spec: dict[str, Any], *, shared_filesystem: bool = True, allowed: str = EVERYTHING
) -> dict[str, str]:
    listed = allowed_by(prefixes_in(allowed), store_url="/no/store")
    judged = judge(
        parse(spec),
        allowed=listed,
        shared_filesystem=shared_filesystem,
        looks=Looks(),
        deadline=time.monotonic() + 60,
    )
    return {problem.path: problem.message for problem in asyncio.run(judged).problems}


@pytest.mark.parametrize(
    "name", ["images", "shard-000.tar", "shard-*.tar", "shard-{000..001}.tar", "**/shard-000.tar"]
)
def test_images__what_is_there_is_taken(folder: Path, name: str) -> None:
    assert found(pretrain(data__uri=str(folder / name))) == {}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("none", "no folder or file"),
        ("empty", "holds no files"),
        ("hidden", "holds no files"),
        ("other-*.tar", "no file fits"),
        ("other-{000..009}.tar", "no file fits"),
        ("s-{0..999999999}.tar", "at most 100000 shards"),
        ("notes.md", "must be a folder or a .tar"),
        ("images.parquet", ".parquet is not supported"),
        ("images.tar.gz", ".tar.gz is not supported"),
    ],
)
def test_images__what_is_not_is_refused(folder: Path, name: str, word: str) -> None:
    (message,) = found(pretrain(data__uri=str(folder / name))).values()
    assert word in message
    assert name in message


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("photos", "must be absolute"),
        ("./photos", "must be absolute"),
        ("~/photos", "must be absolute"),
        ("https://example.org/a.tar", "https:// is not supported"),
        ("gs://bucket/a", "gs:// is not supported"),
        ("file:///data", "file:// is not supported"),
        ("s3://", "s3://bucket/prefix/"),
        ("s3://B", "s3://bucket/prefix/"),
    ],
)
@pytest.mark.parametrize("shared_filesystem", [True, False])
def test_images__a_bad_form_is_refused_everywhere(uri: str, word: str, *, shared_filesystem: bool) -> None:
    problems = found(pretrain(data__uri=uri), shared_filesystem=shared_filesystem)
    assert set(problems) == {"data.uri"}
    assert word in problems["data.uri"]
    assert uri in problems["data.uri"]


def test_images__a_bucket_and_the_folders_of_other_machines_are_not_looked_into() -> None:
    assert found(pretrain(data__uri="s3://bucket/photos/")) == {}
    assert found(pretrain(data__uri="/no/such/folder"), shared_filesystem=False) == {}


def test_places__each_has_its_own_path(folder: Path) -> None:
    probe = {"train": "a", "val": "b", "every": {"epochs": 1}}
    assert set(found(pretrain(probe=probe, data__uri=str(folder / "images")))) == {"probe.train", "probe.val"}
    assert set(found(evaluate(data={"train": "a", "val": "b"}))) == {"data.train", "data.val"}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("tok", "must be absolute"),
        ("tok", "or dall-e"),
        ("random", "must be absolute"),
        ("/none", "lacks config.json"),
    ],
)
def test_tokenizer__an_address_that_cannot_be_is_refused(folder: Path, source: str, word: str) -> None:
    spec = pretrain(model__tokenizer__source=source, data__uri=str(folder / "images"))
    assert word in found(spec)["model.tokenizer.source"]


def official(folder: Path, **given: str) -> dict[str, Any]:
    tokenizer = {"source": "dall-e", **given}
    return pretrain(model__tokenizer=tokenizer, data__uri=str(folder / "images"))


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/encoder.pkl",
        "http://127.0.0.1:8080/a?b=c",
        "https://[::1]:81/encoder.pkl",
        "s3://bucket/deep/encoder.pkl",
    ],
)
def test_official__addresses_are_taken(folder: Path, address: str) -> None:
    assert found(official(folder)) == {}
    assert found(official(folder, encoder=address, decoder=address)) == {}


def test_official__a_file_is_looked_for_where_it_can_be_seen(folder: Path) -> None:
    (folder / "encoder.pkl").touch()
    here, gone = str(folder / "encoder.pkl"), str(folder / "gone.pkl")
    spec = official(folder, encoder=here, decoder=gone)
    assert found(spec) == {
        "model.tokenizer.decoder": f"there is no file {gone} on the machine of the service"
    }
    assert found(spec, shared_filesystem=False) == {}
    assert set(found(official(folder, encoder=str(folder / "images")))) == {"model.tokenizer.encoder"}


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("encoder.pkl", "must be absolute"),
        ("ftp://example.org/encoder.pkl", "ftp:// is not supported"),
        ("file:///encoder.pkl", "file:// is not supported"),
        ("https://", "must be a web address"),
        ("https:///encoder.pkl", "must be a web address"),
        ("https://example.org:port/e", "must be a web address"),
        ("https://example.org:0/e", "must be a web address"),
        ("https://[::1/e", "must be a web address"),
        ("https://example.org/a b", "must be a web address"),
        ("s3://bucket", "must name a file"),
        ("s3://bucket/deep/", "must name a file"),
        ("s3://B/encoder.pkl", "s3://bucket/"),
        ("job:tok", "must be absolute"),
    ],
)
@pytest.mark.parametrize("shared_filesystem", [True, False])
def test_official__an_address_that_cannot_be_is_refused(
    folder: Path, address: str, word: str, *, shared_filesystem: bool
) -> None:
    problems = found(official(folder, decoder=address), shared_filesystem=shared_filesystem)
    problems.pop("data.uri", None)
    assert set(problems) == {"model.tokenizer.decoder"}
    assert word in problems["model.tokenizer.decoder"]


def test_encoder__a_folder_with_a_model_is_taken(folder: Path) -> None:
    data = {"train": str(folder / "images"), "val": str(folder / "images")}
    assert found(evaluate(encoder=str(folder / "encoder"), data=data)) == {}
    assert "lacks config.json" in found(evaluate(encoder=str(folder / "images"), data=data))["encoder"]
    assert "must be absolute" in found(evaluate(encoder="fake", data=data))["encoder"]
    assert "must be absolute" in found(evaluate(encoder="dall-e", data=data))["encoder"]


@pytest.mark.parametrize(
    "name",
    ["{,}" * 1300, "x" * 300, "{" * 4000, "{0..9}" * 600, "a/" * 2000, "{" + "0" * 3000 + "..1}", "[" * 4000],
    ids=["braces", "long", "open", "numbers", "deep", "digits", "brackets"],
)
def test_places__what_no_file_system_takes_is_refused_like_the_rest(folder: Path, name: str) -> None:
    uri = f"{folder}/{name}"[:4096]
    spec = official(folder, encoder=uri, decoder=uri)
    spec["data"]["uri"] = uri
    assert set(found(spec)) == {"data.uri", "model.tokenizer.encoder", "model.tokenizer.decoder"}
    assert set(found(evaluate(encoder=uri, data={"train": uri, "val": uri}))) == {
        "encoder",
        "data.train",
        "data.val",
    }


def test_places__a_look_ends_where_there_is_too_much_to_see(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri in (f"{folder}/**/none.tar", f"{folder}/*/*/none.tar", f"{folder}/empty"):
        assert set(found(pretrain(data__uri=uri))) == {"data.uri"}
    monkeypatch.setattr(places, "_MOST_LOOKS", 1)
    for uri in (f"{folder}/**/none.tar", f"{folder}/*/*/none.tar", f"{folder}/empty"):
        assert found(pretrain(data__uri=uri)) == {}, "the workers see for themselves"


def nested(folder: Path, *, depth: int, name: str) -> Path:
    """`folder` with so many folders in each other, and no file."""
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    return folder


@pytest.mark.parametrize(
    ("depth", "name", "word"),
    [(1500, "d", "holds no files"), (20, "d" * 250, "cannot be read: File name too long")],
    ids=["many", "long"],
)
def test_images__folders_in_folders_without_end_are_answered(
    tmp_path: Path, depth: int, name: str, word: str
) -> None:
    uri = nested(tmp_path / "photos", depth=depth, name=name)
    try:
        assert word in found(pretrain(data__uri=str(uri)))["data.uri"]
        assert "data.uri" in found(pretrain(data__uri=f"{uri}/**/*.tar"))
        assert _num_files(str(uri)) in (0, None)
        assert _num_files(f"{uri}/*/*.tar") is None
    finally:
        subprocess.run(["rm", "-rf", str(uri)], check=True)


@pytest.mark.parametrize("name", ["loop", "loop/photos", "loop-*.tar", "l{oop,ap}"])
def test_images__a_link_to_itself_is_answered(folder: Path, name: str) -> None:
    for loop in ("loop", "loop-0.tar", "images/loop"):
        (folder / loop).symlink_to(Path(loop).name)
    assert "data.uri" in found(pretrain(data__uri=str(folder / name)))
    assert "encoder" in found(evaluate(encoder=str(folder / "loop")))
    assert found(pretrain(data__uri=str(folder / "images")), allowed=str(folder)) == {}
    assert "data.uri" in found(pretrain(data__uri=str(folder / name)), allowed=str(folder))
    assert _num_files(str(folder / name)) is None
    assert _num_files(str(folder / "images")) == 1


def test_images__hidden_folders_hold_nothing(folder: Path) -> None:
    (folder / "empty" / ".cache").mkdir()
    (folder / "empty" / ".cache" / "a.png").touch()
    assert "holds no files" in found(pretrain(data__uri=str(folder / "empty")))["data.uri"]
