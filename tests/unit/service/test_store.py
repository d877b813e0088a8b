"""The object store in a folder, and the way from an address to a store."""

import errno
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from service.store import MissingObjectError, ObjectStore, StoreError, StoreFullError, open_store
from service.store.base import TEMPORARY
from service.store.directory import DirectoryStore
from service.store.s3 import S3Store
from tests.fakes.stepping_store import SteppingStore
from tests.unit.service.store_contract import Begin, StoreContract

MIB = 1 << 20


class TestDirectoryStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return open_store(str(tmp_path / "objects"))

    @pytest.fixture
    def begin(self, tmp_path: Path) -> Begin:
        return partial(leave_half, tmp_path / "objects")


class TestSteppingStore(TestDirectoryStore):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return SteppingStore(DirectoryStore(tmp_path / "objects"))


def leave_half(root: Path, key: str, data: bytes) -> None:
    """What a writer leaves that is killed before its last step."""
    part = (root / key).parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)


def test_leave_half__is_where_a_writer_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = DirectoryStore(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda _handle: seen.append(store.uploads()))
    store.put_bytes("a/k", b"half")
    leave_half(tmp_path, "a/k", b"half")
    ((under_way,), (left,)) = seen[0], store.uploads()
    assert (under_way.key, under_way.id[:10]) == (left.key, left.id[:10]) == ("a", ".cim-part-")


def test_delete__leaves_no_empty_folders(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    for key in ("a/b/c/x", "a/b/y", "z"):
        store.put_bytes(key, b"")
    leave_half(tmp_path / "objects", "half/x", b"")
    store.delete(["a/b/c/x"])
    assert not (tmp_path / "objects/a/b/c").exists()
    store.delete(["a/b/y", "z"])
    store.abort(*store.uploads())
    assert list(tmp_path.rglob("*")) == [tmp_path / "objects"]


def test_put__the_synced_file_takes_its_place_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    store.put_bytes("a/k", b"old")
    seen: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        seen.append(store.get_bytes("a/k"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put_bytes("a/k", b"new")
    assert seen == [b"old", b"new"]  # the file is synced before it is seen, its folder after


def test_put__a_break_leaves_the_old_object_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    store.put_bytes("k", b"old")

    def broken(_handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="Input/output error") as raised:
        store.put_bytes("k", b"new")
    assert not isinstance(raised.value, StoreFullError)
    assert store.get_bytes("k") == b"old"
    assert os.listdir(tmp_path) == ["k"]


def test_put__a_missing_local_file_is_not_the_stores_failure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectoryStore(tmp_path / "s").put_file("k", tmp_path / "none")


def test_list__files_being_written_are_no_objects(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / ".cim-part-0123").write_bytes(b"half")
    assert store.list() == []


def test_read__an_object_that_vanishes_is_an_error_not_an_end(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put_bytes("k", b"x")
    chunks = store.read("k")
    (tmp_path / "k").unlink()
    with pytest.raises(StoreError):
        list(chunks)


@pytest.mark.parametrize(("number", "kind"), [(errno.EDQUOT, StoreFullError), (errno.EACCES, StoreError)])
def test_errors__are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError) as raised:
        DirectoryStore(tmp_path).put_bytes("a/k", b"")
    assert type(raised.value) is kind
    assert os.strerror(number) in str(raised.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk__is_named_and_leaves_the_rest_intact(small_disk: Path, tmp_path: Path) -> None:
    store = DirectoryStore(small_disk)
    store.put_bytes("a/first", b"x" * 1000)
    source = tmp_path / "large"
    source.write_bytes(bytes(2 * MIB))

    puts = (partial(store.put_file, "a/large", source), partial(store.put_bytes, "a/large", bytes(2 * MIB)))
    for put in puts:
        with pytest.raises(StoreFullError) as raised:
            put()
        assert str(small_disk) in str(raised.value)
        assert "bytes free" in str(raised.value)
        assert raised.value.code == "store_full"
    assert [entry.key for entry in store.list()] == ["a/first"]
    assert os.listdir(small_disk / "a") == ["first"]  # room taken by the half file is free again
    store.put_bytes("a/second", b"y" * (MIB // 2))
    assert store.get_bytes("a/first") == b"x" * 1000


def test_presign__a_folder_has_no_addresses(tmp_path: Path) -> None:
    assert DirectoryStore(tmp_path).presign("k") is None


@pytest.mark.parametrize("url", ["", "photos", "./photos", "file:///x", "gs://bucket/x", "s3://", "s3:///x"])
def test_open__other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"s3://BUCKET/PREFIX"):
        open_store(url)


def test_open__a_new_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "not" / "yet"))
    assert store.list() == []
    with pytest.raises(MissingObjectError):
        store.get_bytes("k")


def test_open__s3_opens_no_connection() -> None:
    assert isinstance(open_store("s3://bucket/some/prefix/", endpoint_url="http://127.0.0.1:1"), S3Store)
