import errno
from dataclasses import replace
from pathlib import Path

import pytest

from cim_core.errors import DataError
from service.contracts.allowed import ANYWHERE, Allowed
from service.contracts.work import StoreAddress
from service.store.directory import DirectoryStore
from workers import cache as cache_module
from workers.cache import Cache, discard


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    made = DirectoryStore(tmp_path / "store")
    made.put_bytes("jobs/ab/encoder/config.json", b"{}")
    made.put_bytes("jobs/ab/encoder/deep/x", b"xx")
    made.put_bytes("jobs/abc/encoder/other", b"no")
    return made


@pytest.fixture
def cache(tmp_path: Path, store: DirectoryStore) -> Cache:
    return Cache(
        folder=tmp_path / "cache", address=StoreAddress(url=str(tmp_path / "store")), allowed=ANYWHERE
    )


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_artifact__a_prefix_of_the_store_is_downloaded_once(cache: Cache, store: DirectoryStore) -> None:
    folder = cache.artifact("jobs/ab/encoder")
    assert names(folder) == ["config.json", "deep/x"]
    (folder / "config.json").write_bytes(b"[]")  # of the same size: must not be fetched again
    assert cache.artifact("jobs/ab/encoder") == folder
    assert (folder / "config.json").read_bytes() == b"[]"


def test_artifact__a_folder_is_used_where_it_lies(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert cache.artifact(f"file://{tmp_path}/mine") == tmp_path / "mine"


def test_artifact__missing_ones_are_named(cache: Cache, store: DirectoryStore) -> None:
    with pytest.raises(DataError, match="nothing is stored at jobs/zz/encoder"):
        cache.artifact("jobs/zz/encoder")
    with pytest.raises(DataError, match="/nowhere is not a folder"):
        cache.artifact("/nowhere")


def test_artifact__a_place_that_cannot_be_there_is_the_users_to_mend(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "x" * 300):
        with pytest.raises(DataError, match=r"(loop|xxx).* is not a folder"):
            cache.artifact(f"{tmp_path}/{name}")


def test_artifact__a_folder_that_may_not_be_read_is_the_users_to_mend(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="mine cannot be read: Permission denied; make it readable"):
        cache.artifact(f"{tmp_path}/mine")


def test_artifact__no_way_leads_out_of_what_is_allowed(tmp_path: Path, cache: Cache) -> None:
    for name in ("inside/net", "outside/net"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "inside/link").symlink_to(tmp_path / "outside/net")
    (tmp_path / "inside/half").mkdir()
    (tmp_path / "inside/half/config.json").symlink_to(tmp_path / "outside/net/config.json")
    fenced = replace(cache, allowed=Allowed(prefixes=(f"{tmp_path}/inside",)))
    assert fenced.artifact(f"{tmp_path}/inside/net") == tmp_path / "inside/net"
    # What another job has made is a key of the store, not an address.
    assert names(fenced.artifact("jobs/ab/encoder")) == ["config.json", "deep/x"]
    for source, word in (
        (f"{tmp_path}/outside/net", "must lie below"),
        (f"{tmp_path}/inside/../outside/net", "must not hold the part"),
        (f"{tmp_path}/inside/link", "through a link"),
        (f"{tmp_path}/inside/half", "through a link"),
        ("s3://bucket/net", "must lie below"),
    ):
        with pytest.raises(DataError, match=word):
            fenced.artifact(source)
        assert cache.artifact(source) if source.startswith("/") else True


def test_images__no_way_leads_out_of_what_is_allowed(tmp_path: Path, cache: Cache) -> None:
    for name in ("inside/a.tar", "inside/deep/b.tar", "outside/b.tar", "inside-too/b.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "inside/folder").symlink_to(tmp_path / "outside")
    (tmp_path / "inside/c.tar").symlink_to(tmp_path / "outside/b.tar")
    (tmp_path / "inside/same.tar").symlink_to(tmp_path / "inside/a.tar")
    inside = f"{tmp_path}/inside"
    fenced = replace(cache, allowed=Allowed(prefixes=(inside,)))
    for path in (inside, f"{inside}/a.tar", f"{inside}/[as]*.tar", f"{inside}/{{a,same}}.tar"):
        assert fenced.images(path) == path
    for path, word in (
        (f"{tmp_path}/inside-too", "must lie below"),
        (f"{tmp_path}/inside-too/b.tar", "must lie below"),
        (f"{inside}/../outside", "must not hold the part"),
        (f"{inside}/{{.,x}}{{.,y}}/outside/b.tar", "must not hold the part"),
        (f"{inside}/{{a,../outside/b}}.tar", "must not hold the part"),
        (f"{inside}/folder", "through a link"),
        (f"{inside}/folder/b.tar", "through a link"),
        (f"{inside}/c.tar", "through a link"),
        (f"{inside}/*.tar", "through a link"),
        (f"{inside}/**/b.tar", "deep"),
        ("s3://bucket/photos", "must lie below"),
    ):
        if word == "deep":
            assert fenced.images(path) == path  # a folder's link is not followed by **
            continue
        with pytest.raises(DataError, match=word):
            fenced.images(path)


def test_images__paths_stay_and_relative_ones_are_refused(cache: Cache) -> None:
    assert cache.images("file:///data/shard-{0..3}.tar") == "/data/shard-{0..3}.tar"
    with pytest.raises(DataError, match="relative path"):
        cache.images("photos")


@pytest.mark.parametrize(
    ("uri", "last", "found"),
    [
        ("s3://b/set/", None, ["0.tar", "1.tar", "deep/2.png"]),
        ("s3://b/set/{0..1}.tar", "{0..1}.tar", ["0.tar", "1.tar"]),
        ("s3://b/set/1.tar", "1.tar", ["1.tar"]),
    ],
)
def test_images__s3_brings_what_the_pattern_names(
    cache: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    last: str | None,
    found: list[str],
) -> None:
    bucket = DirectoryStore(tmp_path / "bucket")
    for key in ("0.tar", "1.tar", "deep/2.png"):
        bucket.put_bytes(key, key.encode())
    opened: list[str] = []

    def open_store(url: str, *, endpoint_url: str | None, region: str | None) -> DirectoryStore:
        opened.append(url)
        return bucket

    monkeypatch.setattr(cache_module, "open_store", open_store)
    place = Path(cache.images(uri))
    assert opened == ["s3://b/set"]
    assert names(place if last is None else place.parent) == found
    assert last is None or place.name == last


@pytest.mark.parametrize("waits", [True, False])
def test_discard__log_lines_that_wait_stay(tmp_path: Path, *, waits: bool) -> None:
    (tmp_path / "job/photos").mkdir(parents=True)
    spool = tmp_path / "job/logs/attempt-1"
    spool.mkdir(parents=True)
    (spool / "driver.lock").touch()
    if waits:
        (spool / "driver-000000.jsonl").touch()
    discard(tmp_path / "job")
    assert [path.name for path in (tmp_path / "job").glob("*")] == (["logs"] if waits else [])
