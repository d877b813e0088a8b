"""Artifacts to local files, each checked against its manifest line before it takes its place."""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from service.client.errors import ApiError, CorruptDownloadError
from service.client.http import Transport
from service.contracts.jobs import FileEntry

OnBytes = Callable[[int, int], None]
CHUNK_BYTES = 1 << 20
READ_TIMEOUT_S = 60.0


class Downloader:
    """Fetches files one after the other and counts their bytes."""

    def __init__(self, transport: Transport, *, patience_s: float, on_progress: OnBytes | None) -> None:
        self._transport = transport
        self._patience_s = patience_s
        self._on_progress = on_progress or (lambda _done, _all: None)
        self._done = self._all = 0
        self._direct = True  # from the object store, where the service can hand out such addresses

    def fetch(self, files: Sequence[FileEntry], folder: Path, *, address: str) -> list[Path]:
        """Write `files` below `folder`; `address` is the path of the artifacts on the service."""
        self._done, self._all = 0, sum(entry.size for entry in files)
        self._on_progress(self._done, self._all)
        paths = []
        for entry in files:
            path = _place(folder, entry.path)
            if not _is_there(path, entry):
                self._patiently(f"{address}/{quote(entry.path)}", entry, path)
            self._done += entry.size
            self._on_progress(self._done, self._all)
            paths.append(path)
        return paths

    def _patiently(self, address: str, entry: FileEntry, path: Path) -> None:
        self._transport.patiently(lambda: self._either_way(address, entry, path), patience_s=self._patience_s)

    def _either_way(self, address: str, entry: FileEntry, path: Path) -> None:
        if self._direct:
            try:
                self._one(address, entry, path)
            except ApiError:
                # The object store may be out of this machine's reach; the service itself is not.
                self._direct = False
            else:
                return
        self._one(f"{address}?redirect=false", entry, path)

    def _one(self, address: str, entry: FileEntry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with (
                part.open("xb") as file,
                self._transport.stream(address, read_timeout_s=READ_TIMEOUT_S) as response,
            ):
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    self._on_progress(self._done + size, self._all)
            if digest.hexdigest() != entry.sha256:
                raise CorruptDownloadError(
                    f"{entry.path} arrived damaged: {size} bytes of {entry.size}, its SHA-256 "
                    f"{digest.hexdigest()} is not the manifest's {entry.sha256}; try again"
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _place(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise CorruptDownloadError(f"the service names a file {path!r} that would lie outside of {folder}")
    return folder / parts


def _is_there(path: Path, entry: FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
