"""Pieces of log that the object store has, stored once more as one object: a day has 43,000 of them."""

import sys
from typing import Protocol

from service.contracts.log_names import LogName

JOIN_PIECES = 64
JOIN_BYTES = 1 << 20  # in memory until then; larger pieces are worth a read of their own


class PutBytes(Protocol):
    """The part of an object store that log lines need."""

    def put_bytes(self, key: str, data: bytes) -> object:
        """Store `data` under `key`."""
        ...


class Joins:
    """What the only sender of a source has sent, kept until it is stored joined below `prefix`.

    A join repeats lines that are safe already. So one that the store refuses is given up, and a process
    that is killed leaves at most `JOIN_PIECES - 1` pieces that stay apart.
    """

    def __init__(self, store: PutBytes, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._names: list[LogName] = []
        self._lines: list[bytes] = []
        self.size = 0  # bytes in memory

    def add(self, name: str, data: bytes) -> None:
        """Take over a piece that was stored. Raises nothing."""
        piece = LogName.parse(name)
        assert piece is not None, f"not a piece of log: {name}"
        if self._names and (piece.first != self._names[-1].last + 1 or not self._has_room(data)):
            self.store_rest()
        if not self._has_room(data):
            return
        self._names.append(piece)
        self._lines.append(_whole_lines(data))
        self.size += len(self._lines[-1])
        if len(self._names) == JOIN_PIECES:
            self.store_rest()

    def store_rest(self) -> None:
        """Store what has gathered as one object, unless it is a single piece. Raises nothing."""
        names, lines = self._names, self._lines
        self._names, self._lines, self.size = [], [], 0
        if len(names) < 2:
            return
        join = LogName(source=names[0].source, first=names[0].first, last=names[-1].last)
        try:
            self._store.put_bytes(f"{self._prefix}/{join}", b"".join(lines))
        except Exception as error:
            # Logging it would make more lines to send.
            sys.stderr.write(f"{len(names)} pieces of log stay apart, the object store refused: {error}\n")

    def _has_room(self, data: bytes) -> bool:
        return self.size + len(data) <= JOIN_BYTES


def _whole_lines(data: bytes) -> bytes:
    """The piece; a line that a full disk has cut off must not swallow the next piece's first."""
    return data if data.endswith(b"\n") or not data else data + b"\n"
