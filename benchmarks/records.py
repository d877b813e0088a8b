"""Results as JSON lines: a run's line is there or not, whatever cut the command."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """The records of earlier runs; a last line that was cut in the middle is dropped."""
    if not file.exists():
        return []
    whole, _, _cut = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one record; what an earlier cut left of a line is removed first."""
    if file.exists():
        whole, _, cut = file.read_bytes().rpartition(b"\n")
        if cut:
            file.write_bytes(whole + b"\n" if whole else b"")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
