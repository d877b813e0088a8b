import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.contracts.jobs import LogLine
from workers.logs import LogShipper, attach, detach
from workers.spool import Spool


class Shelf:
    """An object store of bytes that may be away."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.away = False

    def put_bytes(self, key: str, data: bytes) -> None:
        if self.away:
            raise OSError("away")
        self.objects[key] = data

    def lines(self) -> list[LogLine]:
        text = b"".join(self.objects[key] for key in sorted(self.objects)).decode()
        return [LogLine.model_validate(json.loads(line)) for line in text.splitlines()]

    def messages(self) -> list[str]:
        return [line.message for line in self.lines()]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def shipper(shelf: Shelf, tmp_path: Path) -> Iterator[LogShipper]:
    made = LogShipper(
        shelf,
        "logs/attempt-2",
        spool=tmp_path / "attempt-2",
        attempt=2,
        source="rank-0",
        secrets=["s3cret"],
        lines_per_minute=5,
    )
    attach(made)
    yield made
    detach(made)


log = logging.getLogger("workers.test")


def test_ship__chunks_are_numbered_and_hold_what_was_new(shipper: LogShipper, shelf: Shelf) -> None:
    log.info("one")
    shipper.ship()
    shipper.ship()
    log.warning("two")
    shipper.ship()
    assert sorted(shelf.objects) == [
        "logs/attempt-2/rank-0-000000.jsonl",
        "logs/attempt-2/rank-0-000001.jsonl",
    ]
    assert [(line.message, line.level, line.attempt) for line in shelf.lines()] == [
        ("one", "info", 2),
        ("two", "warning", 2),
    ]


def test_emit__a_line_that_cannot_be_made_costs_that_line_alone(
    shipper: LogShipper, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("many",), (3,)):
        shipper.emit(logging.LogRecord("workers", logging.INFO, "", 0, "%d files", arguments, None))
    shipper.ship()
    assert shelf.messages() == ["3 files"]
    assert "many" in capsys.readouterr().err


def test_emit__secrets_and_tracebacks(shipper: LogShipper, shelf: Shelf) -> None:
    try:
        raise RuntimeError("the token is s3cret")
    except RuntimeError:
        log.exception("failed with s3cret")
    shipper.ship()
    (message,) = shelf.messages()
    assert "s3cret" not in message
    assert "RuntimeError: the token is ***" in message


def test_emit__others_are_heard_from_warning_on(shipper: LogShipper, shelf: Shelf) -> None:
    other = logging.getLogger("botocore.test")
    other.setLevel(logging.DEBUG)
    other.info("chatter")
    other.warning("grave")
    shipper.ship()
    assert shelf.messages() == ["grave"]


def test_emit__a_flood_is_cut_and_counted(shipper: LogShipper, shelf: Shelf) -> None:
    for number in range(12):
        log.info("%d", number)
    shipper.ship()
    assert shelf.messages()[:5] == ["0", "1", "2", "3", "4"]
    assert "7 log lines were dropped" in shelf.messages()[5]


def test_ship__lines_wait_while_the_store_is_away(shipper: LogShipper, shelf: Shelf) -> None:
    shelf.away = True
    log.info("one")
    assert not shipper.ship()
    log.info("two")
    shelf.away = False
    assert shipper.ship()
    assert shelf.messages() == ["one", "two"]


def test_ship__a_line_that_comes_while_the_chunks_are_listed_takes_none_with_it(
    shipper: LogShipper, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.info("before")
    listed = Spool.chunks
    speaker = threading.Thread(target=log.info, args=("meanwhile",))

    def listed_late(spool: Spool) -> list[Path]:
        speaker.start()
        speaker.join(timeout=0.2)  # it has to wait until they are listed
        return listed(spool)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "chunks", listed_late)
        shipper.ship()
    speaker.join()
    log.info("after")
    shipper.ship()
    assert sorted(shelf.messages()) == ["after", "before", "meanwhile"]


def test_close__ships_the_rest_once(shipper: LogShipper, shelf: Shelf) -> None:
    log.info("last words")
    shipper.close(tries=1)
    shipper.close(tries=1)
    assert shelf.messages() == ["last words"]


def test_abandon__nothing_is_written_any_more(shipper: LogShipper, shelf: Shelf) -> None:
    log.info("one")
    shipper.abandon()
    log.info("two")
    shipper.close(tries=1)
    assert shelf.objects == {}


def test_emit__a_full_disk_costs_lines_and_raises_nothing(
    shipper: LogShipper, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Spool, _line: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", full)
        log.info("lost")
    log.info("kept")
    shipper.ship()
    assert shelf.messages()[0] == "kept"
    assert "1 log lines were dropped" in shelf.messages()[1]


def test_emit__beyond_what_may_wait_lines_are_dropped_until_the_store_is_back(
    shipper: LogShipper, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.logs.MAX_WAITING_LINES", 2)
    shelf.away = True
    for number in range(3):
        log.info("%d", number)
    assert not shipper.ship()
    shelf.away = False
    assert shipper.ship()
    log.info("again")
    shipper.ship()
    assert [text for text in shelf.messages() if "dropped" not in text] == ["0", "1", "again"]
