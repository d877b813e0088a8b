import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cim_core.errors import DataError
from service.contracts.jobs import FailureKind
from tests.fakes.file_server import (
    Answer,
    FileServer,
    dropped_after,
    headers,
    serving_files,
    status,
    whole,
    without_ranges,
)
from workers import downloads
from workers.downloads import SourceAwayError, download, shown
from workers.failures import classify


def anywhere(_: str) -> None:
    """No address is refused."""


CONTENT = bytes(range(256)) * 4096  # a megabyte


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def server(pauses: list[float]) -> Iterator[FileServer]:
    with serving_files({"/a.pkl": CONTENT}) as served:
        yield served


def fetch(server: FileServer, tmp_path: Path, *, path: str = "/a.pkl") -> bytes:
    target = tmp_path / "deep" / "a.pkl"
    download(server.url + path, target, may_fetch=anywhere, on_bytes=lambda *_: None)
    assert [file.name for file in target.parent.iterdir()] == ["a.pkl"]
    return target.read_bytes()


def ranges(server: FileServer) -> list[str | None]:
    return [asked for _, asked in server.requests]


def test_download__brings_the_file_in_pieces(server: FileServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    download(
        f"{server.url}/a.pkl", tmp_path / "a", may_fetch=anywhere, on_bytes=lambda *given: seen.append(given)
    )
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(seen) >= 4
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_download__goes_on_where_the_connection_broke(
    server: FileServer, tmp_path: Path, pauses: list[float]
) -> None:
    server.answers = [dropped_after(1000), dropped_after(0), dropped_after(5)]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-", "bytes=1000-", "bytes=1005-"]
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("tag", "sent"), [('"one"', '"one"'), ('W/"one"', None), (None, None)])
def test_download__goes_on_with_and_without_a_mark_of_the_version(
    server: FileServer, tmp_path: Path, tag: str | None, sent: str | None
) -> None:
    """A weak mark does not say that the bytes are the same (RFC 9110, 13.1.5)."""
    server.tag, server.answers = tag, [dropped_after(1000)]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]
    assert server.conditions == [None, sent]


def test_download__goes_on_after_a_range_that_is_shorter_than_the_rest(
    server: FileServer, tmp_path: Path
) -> None:
    part = headers(206, CONTENT[1000:1004], Content_Range=f"bytes 1000-1003/{len(CONTENT)}")
    server.answers = [dropped_after(1000), part]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-", "bytes=1004-"]


def test_download__waits_for_a_server_that_is_not_ready(
    server: FileServer, tmp_path: Path, pauses: list[float]
) -> None:
    server.answers = [status(503), status(429), status(500)]
    assert fetch(server, tmp_path) == CONTENT
    assert pauses == [1.0, 2.0, 4.0]


def test_download__a_server_without_ranges_is_read_from_the_start(server: FileServer, tmp_path: Path) -> None:
    server.answers = [dropped_after(1000), without_ranges]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]


def test_download__a_file_that_changed_meanwhile_is_read_from_the_start(
    server: FileServer, tmp_path: Path
) -> None:
    def changing(served: FileServer, handler: object) -> None:
        served.files["/a.pkl"], served.tag = CONTENT[::-1], '"two"'
        whole(served, handler)  # type: ignore[arg-type]

    server.answers = [dropped_after(1000), changing]
    assert fetch(server, tmp_path) == CONTENT[::-1]


@pytest.mark.parametrize(
    "answer",
    [
        status(416),
        headers(206, b"xx", Content_Range=f"bytes 0-1/{len(CONTENT)}"),
        headers(206, b"xx", Content_Range="bytes 1000-1001/5000"),
        headers(206, b"xx"),
        headers(206, b"xx", Content_Range="pages 1000-1001/*"),
    ],
)
def test_download__a_range_that_was_not_asked_for_is_not_taken(
    server: FileServer, tmp_path: Path, answer: Answer
) -> None:
    server.answers = [dropped_after(1000), answer]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-", None]


def test_download__follows_redirects(server: FileServer, tmp_path: Path) -> None:
    server.answers = [headers(302, Location="/a.pkl")]
    assert fetch(server, tmp_path, path="/elsewhere") == CONTENT


@pytest.mark.parametrize("location", ["/loop", "ftp://127.0.0.1/a.pkl", "file:///etc/passwd"])
def test_download__a_redirect_that_leads_nowhere_is_the_users(
    server: FileServer, tmp_path: Path, location: str
) -> None:
    server.answers = [headers(302, Location=location) for _ in range(40)]
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_download__no_such_file_is_the_users_and_not_tried_again(
    server: FileServer, tmp_path: Path, code: int
) -> None:
    server.answers = [status(code)]
    with pytest.raises(
        DataError, match=rf"/a\.pkl gives no file but HTTP {code}.*check the address"
    ) as caught:
        fetch(server, tmp_path)
    assert len(server.requests) == 1
    assert classify(caught.value, store_url="/s").kind is FailureKind.USER


def test_download__gives_up_on_a_server_that_stays_away(
    server: FileServer, tmp_path: Path, pauses: list[float]
) -> None:
    server.answers = [status(503)] * 20
    with pytest.raises(SourceAwayError, match=r"could not be fetched in 7 tries.*HTTP 503") as caught:
        fetch(server, tmp_path)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    failure = classify(caught.value, store_url="/s")
    assert failure.kind is FailureKind.INFRASTRUCTURE
    assert failure.message == str(caught.value)


def test_download__a_refused_connection_is_an_absence(pauses: list[float], tmp_path: Path) -> None:
    with serving_files({}) as gone:
        address = f"{gone.url}/a.pkl"
    with pytest.raises(SourceAwayError, match="7 tries"):
        download(address, tmp_path / "a", may_fetch=anywhere, on_bytes=lambda *_: None)
    assert not (tmp_path / "a").exists()


def test_download__tries_are_counted_from_the_last_progress(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PROGRESS_BYTES", 1 << 15)
    server.answers = [dropped_after(1 << 15)] * 20  # more breaks than tries, each with progress
    assert fetch(server, tmp_path) == CONTENT


def test_download__too_large_a_file_is_refused(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(DataError, match="is larger than 1048575 bytes"):
        fetch(server, tmp_path)
    assert (tmp_path / "deep" / "a.pkl.part").stat().st_size == 0


def test_download__ends_when_it_is_told_to(server: FileServer, tmp_path: Path) -> None:
    class StopError(Exception): ...

    def stop(*_: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        download(f"{server.url}/a.pkl", tmp_path / "a", may_fetch=anywhere, on_bytes=stop)
    assert not (tmp_path / "a").exists()


def test_download__bytes_of_an_earlier_process_are_not_trusted(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"old")
    download(f"{server.url}/a.pkl", tmp_path / "a", may_fetch=anywhere, on_bytes=lambda *_: None)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert ranges(server) == [None]


def test_shown__hides_what_may_be_secret() -> None:
    assert shown("https://me:secret@example.org:81/a/b.pkl?key=secret#x") == "https://example.org:81/a/b.pkl"


def test_download__every_address_on_the_way_is_asked_for(server: FileServer, tmp_path: Path) -> None:
    asked: list[str] = []

    def may_fetch(address: str) -> None:
        asked.append(address)
        if address.endswith("/secret"):
            raise DataError("not that one")

    server.answers = [headers(302, Location="/b.pkl"), headers(307, Location=f"{server.url}/secret")]
    with pytest.raises(DataError, match="not that one"):
        download(f"{server.url}/a.pkl", tmp_path / "a", may_fetch=may_fetch, on_bytes=lambda *_: None)
    assert asked == [f"{server.url}/{name}" for name in ("a.pkl", "b.pkl", "secret")]
    assert [path for path, _ in server.requests] == ["/a.pkl", "/b.pkl"]
