"""A real object store in which every step can be watched, or be the last one of a killed process."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from service.store.base import Entries, Entry, ObjectStore, Upload, Uploads


class SteppingStore(ObjectStore):
    """Calls `on_step` before each look and each single deletion; passes the store's contract tests."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.on_step: Callable[[], None] = lambda: None

    def put_bytes(self, key: str, data: bytes) -> None:
        self.inner.put_bytes(key, data)

    def put_file(self, key: str, path: Path) -> None:
        self.inner.put_file(key, path)

    def get_file(self, key: str, path: Path) -> None:
        self.inner.get_file(key, path)

    def read(self, key: str) -> Iterator[bytes]:
        return self.inner.read(key)

    def list(self, prefix: str = "") -> Entries:
        self.on_step()
        return self.inner.list(prefix)

    def stat(self, key: str) -> Entry | None:
        return self.inner.stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.on_step()
            self.inner.delete([key])

    def delete_prefix(self, prefix: str) -> None:
        self.inner.delete_prefix(prefix)

    def uploads(self, prefix: str = "") -> Uploads:
        self.on_step()
        return self.inner.uploads(prefix)

    def abort(self, upload: Upload) -> None:
        self.on_step()
        self.inner.abort(upload)

    def presign(self, key: str, *, expires_s: int = 3600) -> str | None:
        return self.inner.presign(key, expires_s=expires_s)
