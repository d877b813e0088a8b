"""Log lines on this node's disk until the object store has them.

Every line is with the operating system before the next one is made, so a process that is killed loses
none: whoever works for the job on this node next sends what it left. Only a lost node takes lines
with it, those of the last seconds.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import IO

from service.contracts.log_names import LogName
from workers.joins import Joins, PutBytes

LOGS = "logs"  # the folder of a job's spools, beside its downloads


class Spool:
    """The chunks `{source}-{seq:06d}.jsonl` of one process. Its lock file holds the next number.

    Beside a process of the same name that does not end, its chunks are those of `{source}.2`: whoever
    shared a chunk would delete it under the other's feet.
    """

    def __init__(self, folder: Path, source: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._source, self._lock = _own(folder, source)
        self._seq = int(self._lock.read().strip() or 0)
        self._open: IO[str] | None = None

    def append(self, line: str) -> None:
        """Add one line, which ends in a line feed. Raises OSError where the disk takes none."""
        if self._open is None:
            name = LogName(source=self._source, first=self._seq, last=self._seq)
            self._take_number()
            self._open = (self._folder / str(name)).open("a", encoding="utf-8")
        self._open.write(line)
        self._open.flush()

    def roll(self) -> None:
        """End the open chunk, if there is one: it may be sent."""
        if self._open is not None:
            chunk, self._open = self._open, None
            with suppress(OSError):  # the disk is full: `append` has said so of the line in the buffer
                chunk.close()

    def chunks(self) -> list[Path]:
        """What waits, in order. Right after `roll`, before the next `append`, all of it may be sent."""
        return _chunks(self._folder, self._source)

    def close(self) -> None:
        """Give the lock back. What waits stays for whoever comes next."""
        self.roll()
        with suppress(OSError):  # the disk is full
            self._lock.close()

    def _take_number(self) -> None:
        """Write down that the next number is in use: a successor that took it again would replace a piece."""
        self._seq += 1
        self._lock.seek(0)
        self._lock.write(f"{self._seq:06d}")  # in place and never shorter: a full disk allows that
        self._lock.flush()


def send(chunk: Path, store: PutBytes, prefix: str) -> bytes:
    """Store `chunk` under its name below `prefix`, then delete it; what it held.

    Whoever is killed in between leaves a chunk that is sent once more, under the same name.
    """
    data = chunk.read_bytes()
    store.put_bytes(f"{prefix}/{chunk.name}", data)
    chunk.unlink(missing_ok=True)
    return data


def recover(spools: Path, store: PutBytes, prefix: str) -> int:
    """Send what dead processes left in the spools below `spools`; returns the number of chunks.

    Those of the spool `attempt-3` go to `{prefix}/attempt-3/`.
    """
    num_sent = 0
    for folder, source in sorted({(path.parent, _source(path)) for path in spools.glob("*/*.jsonl")}):
        joins = Joins(store, f"{prefix}/{folder.name}")
        for chunk in _of_the_dead(folder, source):
            joins.add(chunk.name, send(chunk, store, f"{prefix}/{folder.name}"))
            num_sent += 1
        joins.store_rest()
    return num_sent


def _source(chunk: Path) -> str:
    return chunk.stem.rpartition("-")[0]


def _of_the_dead(folder: Path, source: str) -> Iterator[Path]:
    with _lock_file(folder, source) as lock:
        if _locked(lock):  # otherwise it lives, and sends them itself
            yield from _chunks(folder, source)


def _chunks(folder: Path, source: str) -> list[Path]:
    found = (path for path in folder.glob("*.jsonl") if _source(path) == source)
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _own(folder: Path, source: str) -> tuple[str, IO[str]]:
    """The first free name of `source`, `source.2`, `source.3` ... and its lock, which is held."""
    for name in chain([source], (f"{source}.{number}" for number in count(2))):
        lock = _lock_file(folder, name)
        if _locked(lock):
            return name, lock
        lock.close()
    raise AssertionError("there is always a next number")


def _lock_file(folder: Path, source: str) -> IO[str]:
    handle = os.open(folder / f"{source}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    return os.fdopen(handle, "r+")


def _locked(lock: IO[str]) -> bool:
    """Whether nobody else holds it, so that we do now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
