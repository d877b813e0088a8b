"""OpenAI's tokenizer from an address to the object store, with everything that may go wrong between."""

import errno
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cim_core.config import TokenizerSource
from cim_core.errors import DataError, ModelError
from cim_core.tokenizers.dalle import DalleTokenizer
from cim_core.tokenizers.store import load_tokenizer
from service.contracts.allowed import ANYWHERE, Allowed
from service.contracts.work import StoreAddress
from service.store.base import ObjectStore
from service.store.directory import DirectoryStore
from tests.fakes.file_server import FileServer, dropped_after, headers, serving_files, status
from tests.unit.cim_core.official_files import dall_e, official_encoder, write_official
from workers import official
from workers.cache import Cache
from workers.official import OfficialTokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_official(tmp_path_factory.mktemp("openai"))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def server(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving_files({f"/{path.name}": path.read_bytes() for path in files}) as served:
        yield served


def job(store: ObjectStore, folder: Path, **source: Any) -> OfficialTokenizer:
    return OfficialTokenizer(
        allowed=ANYWHERE,
        source=TokenizerSource(source="dall-e", **source),
        store=store,
        address=StoreAddress(url="/unused"),
        folder=folder,
        say=lambda _: None,
        go_on=lambda: None,
    )


def on(server: FileServer) -> dict[str, str]:
    return {"encoder": f"{server.url}/encoder.pkl", "decoder": f"{server.url}/decoder.pkl"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keys(store: DirectoryStore) -> list[str]:
    return [entry.key for entry in store.list("tokenizers")]


def test_place__a_rank_loads_from_it_what_openais_files_hold(
    files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path
) -> None:
    place = job(store, tmp_path / "job", encoder=str(files[0]), decoder=str(files[1])).place()
    assert place.startswith("tokenizers/dall-e/")
    cache = Cache(
        folder=tmp_path / "rank", address=StoreAddress(url=str(tmp_path / "store")), allowed=ANYWHERE
    )
    tokenizer = load_tokenizer(cache.artifact(place))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    expected = official_encoder()(dall_e.map_pixels(pictures)).argmax(dim=1)
    assert torch.equal(tokenizer.encode(pictures), expected)
    assert isinstance(tokenizer, DalleTokenizer)
    assert tokenizer.origin == {"encoder_sha256": sha256(files[0]), "decoder_sha256": sha256(files[1])}
    assert all(path.is_file() for path in files)  # a file of the user's stays


def test_place__a_second_job_downloads_nothing(
    server: FileServer, store: DirectoryStore, tmp_path: Path
) -> None:
    first = job(store, tmp_path / "a", **on(server)).place()
    assert len(server.requests) == 2
    assert job(store, tmp_path / "b", **on(server)).place() == first
    assert len(server.requests) == 2
    assert not list(tmp_path.glob("*/dall-e/*.pkl*"))  # what was fetched is not kept on the node


def test_place__is_the_files_and_not_the_way_to_them(
    server: FileServer, files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path
) -> None:
    fetched = job(store, tmp_path / "a", **on(server)).place()
    local = job(store, tmp_path / "b", encoder=str(files[0]), decoder=str(files[1])).place()
    assert local == fetched


def test_place__with_known_checksums_asks_no_server(
    server: FileServer, files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path
) -> None:
    first = job(store, tmp_path / "a", encoder=str(files[0]), decoder=str(files[1])).place()
    digests = {"encoder_sha256": sha256(files[0]), "decoder_sha256": sha256(files[1])}
    assert job(store, tmp_path / "b", **digests).place() == first  # OpenAI's addresses are not tried


def test_place__another_file_at_a_known_address_is_fetched_when_its_checksum_is_given(
    server: FileServer, store: DirectoryStore, tmp_path: Path
) -> None:
    first = job(store, tmp_path / "a", **on(server)).place()
    path = write_official(tmp_path, encoder=official_encoder(use_mixed_precision=False))[0]
    server.files["/encoder.pkl"] = path.read_bytes()
    assert job(store, tmp_path / "b", **on(server)).place() == first
    assert job(store, tmp_path / "c", **on(server), encoder_sha256=sha256(path)).place() != first


def test_place__survives_a_bad_line(server: FileServer, store: DirectoryStore, tmp_path: Path) -> None:
    server.answers = [status(503), dropped_after(5000), dropped_after(9000)]
    place = job(store, tmp_path / "a", **on(server)).place()
    assert keys(store)[:2] == [f"{place}/config.json", f"{place}/model.safetensors"]


def test_place__notes_what_an_address_held_without_its_secrets(
    server: FileServer, files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path
) -> None:
    server.files["/encoder.pkl?key=secret"] = server.files["/encoder.pkl"]
    source = {**on(server), "encoder": f"{server.url}/encoder.pkl?key=secret"}
    job(store, tmp_path / "a", **source).place()
    key = f"tokenizers/dall-e/sources/{hashlib.sha256(source['encoder'].encode()).hexdigest()}.json"
    note = json.loads(store.get_bytes(key))
    assert note == {
        "address": f"{server.url}/encoder.pkl",
        "sha256": sha256(files[0]),
        "size": files[0].stat().st_size,
    }


def test_place__by_default_is_openais(
    files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(address: str, target: Path, **_: Any) -> None:
        asked.append(address)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(files[len(asked) - 1].read_bytes())

    monkeypatch.setattr(official, "download", download)
    job(store, tmp_path / "a").place()
    assert asked == [
        "https://cdn.openai.com/dall-e/encoder.pkl",
        "https://cdn.openai.com/dall-e/decoder.pkl",
    ]


@pytest.mark.parametrize("local", [True, False])
def test_checksum__another_one_refuses_the_file(
    server: FileServer, files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path, *, local: bool
) -> None:
    source = {"encoder": str(files[0]), "decoder": str(files[1])} if local else on(server)
    wanted = "0" * 64
    with pytest.raises(DataError) as caught:
        job(store, tmp_path / "a", **source, decoder_sha256=wanted).place()
    told = str(caught.value)
    assert told.startswith("model.tokenizer.decoder_sha256: ")
    assert sha256(files[1]) in told
    assert wanted in told
    assert source["decoder"] in told
    assert keys(store) == []


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("content", [b"<html>Moved</html>", pickle.dumps(Hostile()), b""])
def test_content__that_is_not_openais_is_refused_and_not_kept(
    server: FileServer,
    store: DirectoryStore,
    tmp_path: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    server.files["/decoder.pkl"] = content
    with pytest.raises(ModelError, match=r"decoder\.pkl is not one of OpenAI's two files"):
        job(store, tmp_path / "a", **on(server)).place()
    assert keys(store) == []
    assert not (tmp_path / "canary").exists()


def test_place__is_marked_as_whole_last(files: tuple[Path, Path], tmp_path: Path) -> None:
    class Noting(DirectoryStore):
        def put_file(self, key: str, path: Path) -> None:
            written.append(key.rpartition("/")[2])
            super().put_file(key, path)

    written: list[str] = []
    job(Noting(tmp_path / "s"), tmp_path / "a", encoder=str(files[0]), decoder=str(files[1])).place()
    assert written == ["model.safetensors", "config.json"]


def test_content__half_a_conversion_is_done_again(
    files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path
) -> None:
    source = {"encoder": str(files[0]), "decoder": str(files[1])}
    place = job(store, tmp_path / "a", **source).place()
    whole = store.get_bytes(f"{place}/model.safetensors")
    (tmp_path / "store" / place / "config.json").unlink()
    store.put_bytes(f"{place}/model.safetensors", b"half")
    assert job(store, tmp_path / "b", **source).place() == place
    assert store.get_bytes(f"{place}/model.safetensors") == whole


@pytest.mark.parametrize("shared", [True, False], ids=["one node", "two nodes"])
def test_place__jobs_that_meet_agree(
    server: FileServer, store: DirectoryStore, tmp_path: Path, *, shared: bool
) -> None:
    folders = [tmp_path / "a", tmp_path / ("a" if shared else "b")]
    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(lambda folder: job(store, folder, **on(server)).place(), folders))
    assert places[0] == places[1]
    assert len(server.requests) == 2 if shared else 2 <= len(server.requests) <= 4
    folder = tmp_path / "out"
    store.get_folder(places[0], folder)
    assert load_tokenizer(folder).vocab_size == 48


def test_local__a_missing_file_is_named(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"model\.tokenizer\.encoder: /nowhere/e\.pkl is no file on the worker"
    ):
        job(store, tmp_path, encoder="/nowhere/e.pkl").place()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_local__a_file_that_may_not_be_read_is_the_users_to_mend(
    files: tuple[Path, Path],
    store: DirectoryStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def refuse(file: Path, _: str) -> None:
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(Path, "open", refuse)
    one, other = map(str, files)
    with pytest.raises(DataError, match=r"model\.tokenizer\.encoder: .*encoder\.pkl cannot be read: "):
        job(store, tmp_path, encoder=one, decoder=other).place()


def test_local__a_path_that_cannot_be_is_named(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "x" * 300):
        given = f"{tmp_path}/{name}"
        with pytest.raises(DataError, match=r"model\.tokenizer\.encoder: .*is no file on the worker's node"):
            job(store, tmp_path, encoder=given, decoder=given).place()


def test_s3__is_read_with_the_stores_endpoint(
    files: tuple[Path, Path], store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, opened = DirectoryStore(files[0].parent), []

    def open_store(url: str, *, endpoint_url: str | None, region: str | None) -> DirectoryStore:
        opened.append(url)
        return bucket

    monkeypatch.setattr(official, "open_store", open_store)
    source = {"encoder": "s3://b/x/encoder.pkl", "decoder": "s3://b/decoder.pkl"}
    place = job(store, tmp_path / "a", **source).place()
    assert opened == ["s3://b/x", "s3://b"]
    assert f"{place}/config.json" in keys(store)
    with pytest.raises(DataError, match=r"encoder: nothing is stored at s3://b/other\.pkl"):
        job(store, tmp_path / "a", **{**source, "encoder": "s3://b/other.pkl"}).place()


def test_place__a_job_that_is_to_end_ends_in_the_middle(
    server: FileServer, store: DirectoryStore, tmp_path: Path
) -> None:
    class StopError(Exception): ...

    said: list[str] = []

    def go_on() -> None:
        if said:
            raise StopError

    stopped = OfficialTokenizer(
        source=TokenizerSource(source="dall-e", **on(server)),
        store=store,
        address=StoreAddress(url="/unused"),
        allowed=ANYWHERE,
        folder=tmp_path / "a",
        say=said.append,
        go_on=go_on,
    )
    with pytest.raises(StopError):
        stopped.place()
    assert said == ["fetching encoder.pkl: 0 of 0 MB"]
    assert keys(store) == []


def test_place__no_way_leads_out_of_what_is_allowed(
    files: tuple[Path, Path], server: FileServer, store: DirectoryStore, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "encoder.pkl").symlink_to(files[0])
    allowed = Allowed(prefixes=(str(inside), f"{server.url}/inside/"))
    for number, (encoder, word) in enumerate(
        [
            (str(files[0]), "must lie below"),
            (f"{inside}/encoder.pkl", "through a link"),
            (f"{server.url}/encoder.pkl", "must lie below"),
            (f"{server.url}/inside/../encoder.pkl", "must not hold the part"),
            (f"{server.url}/inside/%2e%2e/encoder.pkl", "must not hold the part"),
            ("s3://bucket/encoder.pkl", "must lie below"),
        ]
    ):
        made = job(store, tmp_path / f"j{number}", encoder=encoder, decoder=encoder)
        with pytest.raises(DataError, match=word):
            replace(made, allowed=allowed).place()
    assert server.requests == []
    server.answers = [headers(302, Location="/decoder.pkl")]
    address = f"{server.url}/inside/encoder.pkl"
    with pytest.raises(DataError, match="must lie below"):
        replace(job(store, tmp_path / "sent-on", encoder=address, decoder=address), allowed=allowed).place()
    assert [path for path, _ in server.requests] == ["/inside/encoder.pkl"]
