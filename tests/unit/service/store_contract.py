"""What every object store must do; each kind of store runs all of it."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from service.contracts.jobs import FileEntry
from service.store import CorruptObjectError, Entry, InvalidKeyError, MissingObjectError, ObjectStore

BAD_KEYS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/./b",
    "a//b",
    "a/",
    "a\\b",
    "a\nb",
    "a/\x00",
    "x" * 1025,
    "x" * 256,
]


Begin = Callable[[str, bytes], None]


class StoreContract:
    """Subclasses give a fixture `store`, empty at the start of each test.

    Their fixture `begin` leaves the write of a key as a killed writer does, after some bytes.
    """

    def test_bytes__come_back(self, store: ObjectStore) -> None:
        store.put_bytes("jobs/a/spec.json", b"\x00\xff{}")
        assert store.get_bytes("jobs/a/spec.json") == b"\x00\xff{}"

    def test_bytes__an_empty_object_exists(self, store: ObjectStore) -> None:
        store.put_bytes("empty", b"")
        assert store.get_bytes("empty") == b""
        assert store.stat("empty") == Entry("empty", 0)

    def test_bytes__a_second_write_replaces(self, store: ObjectStore) -> None:
        store.put_bytes("k", b"a long first value")
        store.put_bytes("k", b"second")
        assert store.get_bytes("k") == b"second"
        assert store.list() == [Entry("k", 6)]

    def test_keys__names_with_blanks_and_other_alphabets(self, store: ObjectStore) -> None:
        for key in ("a b/c+d%20&=?#.txt", "Straße/日本.png"):
            store.put_bytes(key, key.encode())
            assert store.get_bytes(key) == key.encode()
        assert [entry.key for entry in store.list()] == sorted(["a b/c+d%20&=?#.txt", "Straße/日本.png"])

    def test_keys__what_is_no_plain_relative_path_is_refused(self, store: ObjectStore) -> None:
        for key in BAD_KEYS:
            for call in (store.get_bytes, store.stat, store.presign, partial(store.put_bytes, data=b"")):
                with pytest.raises(InvalidKeyError):
                    call(key)

    def test_files__come_back_whole(self, store: ObjectStore, tmp_path: Path) -> None:
        source, target = tmp_path / "in.bin", tmp_path / "new folder" / "out.bin"
        source.write_bytes(bytes(range(256)) * 20_000)  # 5 MB: several chunks
        store.put_file("big/file", source)
        store.get_file("big/file", target)
        assert target.read_bytes() == source.read_bytes()
        assert b"".join(store.read("big/file")) == source.read_bytes()
        assert [path.name for path in target.parent.iterdir()] == ["out.bin"]

    def test_missing__each_way_to_read_says_so(self, store: ObjectStore, tmp_path: Path) -> None:
        assert store.stat("no/such") is None
        assert store.list("no") == []
        for read in (store.get_bytes, store.read, lambda key: store.get_file(key, tmp_path / "x")):
            with pytest.raises(MissingObjectError, match="no/such"):
                read("no/such")
        assert not (tmp_path / "x").exists()

    def test_missing__a_folder_is_no_object(self, store: ObjectStore) -> None:
        store.put_bytes("folder/file", b"x")
        assert store.stat("folder") is None
        with pytest.raises(MissingObjectError):
            store.get_bytes("folder")

    def test_list__a_prefix_is_a_folder(self, store: ObjectStore) -> None:
        for key in ("jobs/a/2", "jobs/a/1/x", "jobs/ab/3", "other"):
            store.put_bytes(key, key.encode())
        below_a = [Entry("jobs/a/1/x", 10), Entry("jobs/a/2", 8)]
        assert store.list("jobs/a") == below_a
        assert store.list("jobs/a/") == below_a
        assert [entry.key for entry in store.list()] == ["jobs/a/1/x", "jobs/a/2", "jobs/ab/3", "other"]

    def test_delete__takes_these_keys_and_no_others(self, store: ObjectStore) -> None:
        for key in ("jobs/a/1/x", "jobs/a/1/y", "jobs/a/2", "jobs/ab/3"):
            store.put_bytes(key, b"")
        store.delete(["jobs/a/1/x", "jobs/a/2"])
        assert [entry.key for entry in store.list()] == ["jobs/a/1/y", "jobs/ab/3"]

    def test_delete__what_is_no_object_is_fine(self, store: ObjectStore) -> None:
        store.put_bytes("jobs/a/x", b"")
        store.delete([])
        store.delete(["no/such", "jobs/a", "jobs/a/x/y"])
        assert [entry.key for entry in store.list()] == ["jobs/a/x"]

    def test_delete__a_bad_key_is_refused(self, store: ObjectStore) -> None:
        for key in BAD_KEYS:
            with pytest.raises(InvalidKeyError):
                store.delete([key])

    def test_delete__beside_writers_of_the_same_folder(self, store: ObjectStore) -> None:
        def write(name: str) -> None:
            for _ in range(25):
                store.put_bytes(f"folder/inner/{name}", b"x")
                store.delete([f"folder/inner/{name}"])
            store.put_bytes(f"folder/inner/{name}", b"last")

        # A failure in a thread would only be printed.
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, "abcd"))
        assert store.list() == [Entry(f"folder/inner/{name}", 4) for name in "abcd"]

    def test_uploads__are_no_objects_until_they_end(self, store: ObjectStore, begin: Begin) -> None:
        store.put_bytes("jobs/a/whole", b"x")
        for key in ("jobs/a/1/x", "jobs/ab/x", "top"):
            begin(key, b"half")
        assert [entry.key for entry in store.list()] == ["jobs/a/whole"]
        assert len(store.uploads()) == 3
        (found,) = store.uploads("jobs/a")
        assert found.key in ("jobs/a/1/x", "jobs/a/1")
        assert found.size == 4
        assert abs(found.touched_at - datetime.now(UTC)) < timedelta(minutes=5)
        assert store.uploads("jobs/a/whole") == store.uploads("none") == []

    def test_abort__leaves_other_uploads_and_objects(self, store: ObjectStore, begin: Begin) -> None:
        for key in ("jobs/a/x", "jobs/a/x", "jobs/b/x"):
            begin(key, b"half")
        store.put_bytes("jobs/b/x", b"whole")
        first, second = store.uploads("jobs/a")
        for _ in range(2):
            store.abort(first)
        assert store.uploads("jobs/a") == [second]
        for upload in store.uploads():
            store.abort(upload)
        assert store.uploads() == []
        assert store.list() == [Entry("jobs/b/x", 5)]

    def test_delete__takes_the_folder_and_leaves_its_neighbours(self, store: ObjectStore) -> None:
        for key in ("jobs/a/2", "jobs/a/1/x", "jobs/ab/3"):
            store.put_bytes(key, b"")
        store.delete_prefix("jobs/a")
        store.delete_prefix("jobs/a")
        assert [entry.key for entry in store.list()] == ["jobs/ab/3"]

    def test_delete__everything_at_once_is_refused(self, store: ObjectStore) -> None:
        store.put_bytes("a", b"")
        with pytest.raises(InvalidKeyError):
            store.delete_prefix("")
        assert store.list() == [Entry("a", 0)]

    def test_folder__round_trip_with_a_manifest(self, store: ObjectStore, tmp_path: Path) -> None:
        source = tmp_path / "encoder"
        (source / "sub").mkdir(parents=True)
        (source / "config.json").write_text("{}")
        (source / "sub" / "weights").write_bytes(b"w" * 10)
        (source / "link").symlink_to("/etc/passwd")

        files = store.put_folder("jobs/a/encoder", source, relative_to="jobs/a")
        assert files == [
            FileEntry(path="encoder/config.json", size=2, sha256=hashlib.sha256(b"{}").hexdigest()),
            FileEntry(path="encoder/sub/weights", size=10, sha256=hashlib.sha256(b"w" * 10).hexdigest()),
        ]
        target = tmp_path / "back"
        paths = store.get_folder("jobs/a", target, files=files)
        assert paths == [target / "encoder/config.json", target / "encoder/sub/weights"]
        assert paths[1].read_bytes() == b"w" * 10

        store.get_folder("jobs/a/encoder", target / "all")
        assert (target / "all/sub/weights").read_bytes() == b"w" * 10

    @pytest.mark.parametrize("damaged", [b"ww", b"vvv"], ids=["size", "content"])
    def test_folder__damage_is_found(self, store: ObjectStore, tmp_path: Path, damaged: bytes) -> None:
        store.put_bytes("m/weights", damaged)
        entry = FileEntry(path="weights", size=3, sha256=hashlib.sha256(b"www").hexdigest())
        with pytest.raises(CorruptObjectError, match="weights"):
            store.get_folder("m", tmp_path / "x", files=[entry])

    def test_folder__an_empty_prefix_is_told(self, store: ObjectStore, tmp_path: Path) -> None:
        with pytest.raises(MissingObjectError, match="nowhere"):
            store.get_folder("nowhere", tmp_path)

    def test_writers__many_at_once_leave_one_whole_object(self, store: ObjectStore) -> None:
        values = [bytes([i]) * 50_000 for i in range(4)]
        threads = [threading.Thread(target=store.put_bytes, args=("k", value)) for value in values]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.get_bytes("k") in values
        assert store.list() == [Entry("k", 50_000)]
