"""What each process of a campaign writes down, one line of JSON at a time, on the machine's monotonic clock.

A line is one write to a file opened for appending, so what was noted before a SIGKILL is there after it.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Fact = dict[str, Any]
# Environment of the processes of a campaign: where their journals are, and the head that began a worker.
FOLDER, HEAD_PID = "CHAOS_JOURNAL", "CHAOS_HEAD_PID"
SPOOLS = "spools"  # below that folder: the workers' disk, with the log lines that are not sent yet


class Journal:
    """The file of one process; safe to use from several threads."""

    def __init__(self, folder: Path, who: str, **always: Any) -> None:
        """`always` is added to every line."""
        path = folder / f"{who}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock, self._always = threading.Lock(), {"who": who, "pid": os.getpid(), **always}

    def note(self, kind: str, **facts: Any) -> None:
        """Append one line."""
        line = {"t": time.monotonic(), "kind": kind, **self._always, **facts}
        with self._lock:
            os.write(self._file, json.dumps(line).encode() + b"\n")


def read(folder: Path) -> list[Fact]:
    """The lines of all journals, in the order of their moments."""
    return sorted(_lines(folder), key=lambda fact: fact["t"])


def _lines(folder: Path) -> Iterator[Fact]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)
