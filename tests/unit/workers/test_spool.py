"""What a killed process leaves is sent by whoever comes next, once, in order, and never under its feet."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from workers.spool import Spool, recover, send

WRITER = r"""
import sys, time
from pathlib import Path
from workers.spool import Spool
spool = Spool(Path(sys.argv[1]), "rank-0")
for number in range(int(sys.argv[2])):
    spool.append(f"{number}\n")
    if number % 10 == 9:
        spool.roll()
print("written", flush=True)
time.sleep(600)
"""


class Shelf(dict[str, bytes]):
    """Objects by key; refuses while `away`."""

    away = False

    def put_bytes(self, key: str, data: bytes) -> None:
        if self.away:
            raise OSError("away")
        self[key] = data

    def text(self) -> str:
        return b"".join(self[key] for key in sorted(self)).decode()


def writer(folder: Path, num_lines: int) -> "subprocess.Popen[str]":
    """A process that has written so many lines and lives on."""
    command = [sys.executable, "-c", WRITER, str(folder), str(num_lines)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_recover__every_line_of_a_killed_process_in_order(tmp_path: Path) -> None:
    shelf = Shelf()
    process = writer(tmp_path / "attempt-3", 25)
    assert recover(tmp_path, shelf, "jobs/J/logs") == 0  # it lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert recover(tmp_path, shelf, "jobs/J/logs") == 3
    written = "".join(f"{n}\n" for n in range(25))
    assert shelf.pop("jobs/J/logs/attempt-3/rank-0-000000_000002.jsonl") == written.encode()
    assert sorted(shelf) == [f"jobs/J/logs/attempt-3/rank-0-{n:06d}.jsonl" for n in range(3)]
    assert shelf.text() == written
    assert recover(tmp_path, shelf, "jobs/J/logs") == 0


def test_spool__a_successor_of_the_same_name_overwrites_nothing(tmp_path: Path) -> None:
    shelf = Shelf()
    for number in range(2):
        spool = Spool(tmp_path, "driver")
        spool.append(f"{number}\n")
        spool.close()
        for chunk in spool.chunks():
            send(chunk, shelf, "logs")
    assert shelf == {"logs/driver-000000.jsonl": b"0\n", "logs/driver-000001.jsonl": b"1\n"}


def test_send__a_store_that_is_away_leaves_the_chunk(tmp_path: Path) -> None:
    shelf, spool = Shelf(), Spool(tmp_path, "driver")
    spool.append("a\n")
    spool.roll()
    shelf.away = True
    with pytest.raises(OSError, match="away"):
        send(spool.chunks()[0], shelf, "logs")
    shelf.away = False
    assert send(spool.chunks()[0], shelf, "logs") == b"a\n"
    assert spool.chunks() == []


def test_sources__whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    one, ten = Spool(tmp_path, "rank-1"), Spool(tmp_path, "rank-10")
    one.append("one\n")
    ten.append("ten\n")
    assert [chunk.name for chunk in one.chunks()] == ["rank-1-000000.jsonl"]
    assert [chunk.name for chunk in ten.chunks()] == ["rank-10-000000.jsonl"]


def test_numbers__a_full_disk_and_a_kill_bring_none_back(tmp_path: Path) -> None:
    (tmp_path / "driver-000000.jsonl").symlink_to("/dev/full")
    spool = Spool(tmp_path, "driver")
    with pytest.raises(OSError, match="No space left"):
        spool.append("lost\n")
    spool.roll()
    spool.append("kept\n")
    spool.close()
    successor = Spool(tmp_path, "driver")
    successor.append("later\n")
    assert [chunk.name for chunk in successor.chunks()] == [f"driver-{n:06d}.jsonl" for n in range(3)]
    assert [chunk.read_text() for chunk in successor.chunks()[1:]] == ["kept\n", "later\n"]


def test_numbers__none_is_used_that_could_not_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, "driver")
    with suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails too
        monkeypatch.setattr(spool, "_lock", full)
        with pytest.raises(OSError, match="No space left"):
            spool.append("lost\n")
        assert spool.chunks() == []
        monkeypatch.undo()
    spool.append("kept\n")
    spool.close()
    assert Spool(tmp_path, "driver").chunks() == [tmp_path / "driver-000001.jsonl"]


def test_spool__two_of_the_same_name_share_no_chunk(tmp_path: Path) -> None:
    shelf, first, second = Shelf(), Spool(tmp_path, "driver"), Spool(tmp_path, "driver")
    for spool in (first, second, first):
        spool.append("a line\n")
    second.roll()
    for chunk in second.chunks():
        send(chunk, shelf, "logs")
    first.append("the last\n")
    assert [chunk.read_text() for chunk in first.chunks()] == ["a line\na line\nthe last\n"]
    assert shelf == {"logs/driver.2-000000.jsonl": b"a line\n"}


def test_recover__what_two_of_the_same_name_left(tmp_path: Path) -> None:
    shelf, spools = Shelf(), [Spool(tmp_path / "attempt-1", "driver") for _ in range(2)]
    for number, spool in enumerate(spools):
        spool.append(f"{number}\n")
        spool.close()
    assert recover(tmp_path, shelf, "logs") == 2
    assert shelf.text() == "0\n1\n"
