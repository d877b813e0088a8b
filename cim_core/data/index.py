"""The list of usable images of a data set: a folder, a tar file, or several tar files.

Each file is decoded once, so that training meets no broken file and the user sees every one that was
left out, with the reason. Tar members are read by their place in the archive; nothing is unpacked.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from cim_core.data.sources import Candidate, Finding, Skipped, find
from cim_core.data.transforms import FORMATS, decode
from cim_core.data.unreadable import why
from cim_core.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
OnProgress = Callable[[int, int], None]  # (files looked at, files found)


@dataclass(frozen=True, slots=True)
class Entry:
    """One usable image."""

    path: str  # below the root or inside the container, with forward slashes
    container: str | None  # the tar file that holds it, below the root
    offset: int  # of its first byte in that file
    size_bytes: int
    width: int  # pixels, upright
    height: int
    label: int | None  # place of its class in `Index.classes`

    @property
    def name(self) -> str:
        """The path for people, container included."""
        return self.path if self.container is None else f"{self.container}/{self.path}"


class NoUsableImageError(DataError):
    """Not one file of the data set can be used; `report` says why, file by file."""

    def __init__(self, message: str, *, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Index:
    """All usable images in a fixed order, and what was left out."""

    root: Path
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    classes: tuple[str, ...]  # sorted; empty unless every usable image lies at CLASS/FILE

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, place: int) -> bytes:
        """The bytes of image `place`; OSError where the file is gone."""
        entry = self.entries[place]
        file = self.root / (entry.container or entry.path)
        return _read(file, entry.offset, entry.size_bytes)

    def report(self) -> dict[str, Any]:
        """Counted, used and skipped files, as plain values for `data/report.json`."""
        return {
            "counted": len(self.entries) + len(self.skipped),
            "used": len(self.entries),
            "classes": list(self.classes),
            "skipped": [{"path": s.path, "reason": s.reason} for s in self.skipped],
        }

    def to_json(self) -> str:
        """One line of JSON; names that are not valid UTF-8 survive as escapes."""
        fields = [
            [e.container, e.path, e.offset, e.size_bytes, e.width, e.height, e.label] for e in self.entries
        ]
        skipped = [[s.path, s.reason] for s in self.skipped]
        record = {"root": str(self.root), "classes": self.classes, "entries": fields, "skipped": skipped}
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, root: Path | None = None) -> "Index":
        """The index again; `root` replaces the folder where the same files lie on another machine."""
        record = json.loads(text)
        return cls(
            root=root or Path(record["root"]),
            entries=tuple(
                Entry(path, container, offset, size_bytes, width, height, label)
                for container, path, offset, size_bytes, width, height, label in record["entries"]
            ),
            skipped=tuple(Skipped(path, reason) for path, reason in record["skipped"]),
            classes=tuple(record["classes"]),
        )


def scan(uri_path: str | Path, *, on_progress: OnProgress | None = None, threads: int | None = None) -> Index:
    """Look at every file of a data set and list the usable ones.

    Args:
        uri_path: a folder (searched to any depth; tar files in it count as shards), a `.tar`, or a
            pattern of tars (`shard-*.tar`, `shard-{000..007}.tar`).
        on_progress: called now and then from this thread with (files looked at, files found).
        threads: how many files are decoded at a time; default one for each core, 16 at most.

    Raises:
        DataError: the path does not exist, or is neither folder nor tar.
        NoUsableImageError: nothing was found, or nothing of it is usable.
    """
    finding = find(str(uri_path))
    entries: list[Entry] = []
    skipped = list(finding.skipped)
    for candidate, seen in _look(finding, on_progress or _silent, threads or min(16, os.cpu_count() or 1)):
        if isinstance(seen, str):
            skipped.append(Skipped(candidate.name, seen))
        else:
            entries.append(_entry(candidate, seen))
    labelled, classes = _label(entries)
    skipped.sort(key=lambda s: s.path)
    index = Index(root=finding.root, entries=labelled, skipped=tuple(skipped), classes=classes)
    if not index.entries:
        raise NoUsableImageError(_nothing_usable(uri_path, index), report=index.report())
    return index


def _look(
    finding: Finding, on_progress: OnProgress, threads: int
) -> Iterator[tuple[Candidate, tuple[int, int] | str]]:
    """Each candidate with its (width, height), or with the reason why it is not usable."""
    total, done = len(finding.candidates), 0
    waiting = iter(finding.candidates)
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        # Portions keep a list of a million files from becoming a million waiting tasks.
        while portion := list(islice(waiting, 512)):
            yield from zip(portion, pool.map(lambda c: _inspect(finding.root, c), portion), strict=True)
            done += len(portion)
            on_progress(done, total)


def _inspect(root: Path, candidate: Candidate) -> tuple[int, int] | str:
    if candidate.size_bytes == 0:
        return "empty file"
    if candidate.size_bytes > MAX_FILE_BYTES:
        return f"{candidate.size_bytes} bytes are more than the limit of {MAX_FILE_BYTES}"
    try:
        data = _read(root / (candidate.container or candidate.path), candidate.offset, candidate.size_bytes)
    except OSError as error:
        return f"cannot be read: {why(error)}"
    try:
        return decode(data).size
    except UnidentifiedImageError:
        return f"not an image of a known format ({', '.join(FORMATS)})"
    except Exception as error:  # whatever a broken file makes a decoder raise is the reason we report
        return f"cannot be used: {error or type(error).__name__}"


def _read(file: Path, offset: int, size_bytes: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size_bytes)


def _entry(candidate: Candidate, size: tuple[int, int]) -> Entry:
    c, (width, height) = candidate, size
    return Entry(c.path, c.container, c.offset, c.size_bytes, width, height, label=None)


def _label(entries: Iterable[Entry]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Entries with labels and the classes, where each path is CLASS/FILE; else as they are, and none."""
    kept = tuple(entries)
    folders = [entry.path.split("/") for entry in kept]
    if any(len(parts) != 2 for parts in folders):
        return kept, ()
    classes = tuple(sorted({parts[0] for parts in folders}))
    places = {name: place for place, name in enumerate(classes)}
    labelled = (replace(e, label=places[parts[0]]) for e, parts in zip(kept, folders, strict=True))
    return tuple(labelled), classes


def _nothing_usable(uri_path: str | Path, index: Index) -> str:
    if not index.skipped:
        return f"data.uri: {uri_path} holds no files; give a folder or tar with images"
    first = "; ".join(f"{s.path}: {s.reason}" for s in index.skipped[:3])
    return (
        f"data.uri: none of the {len(index.skipped)} files in {uri_path} is a usable image ({first});"
        " data/report.json lists every file with its reason"
    )


def _silent(_done: int, _found: int) -> None:
    """Nobody wants to know."""
