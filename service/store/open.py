"""From an address to an object store."""

from pathlib import Path
from urllib.parse import urlsplit

from service.store.base import ObjectStore
from service.store.directory import DirectoryStore
from service.store.s3 import S3Store


def open_store(url: str, *, endpoint_url: str | None = None, region: str | None = None) -> ObjectStore:
    """The store at an absolute folder or `s3://bucket/prefix`. Nothing is read or written yet.

    Args:
        url: Where the objects lie.
        endpoint_url: Address of an S3 server other than AWS; only for `s3://`.
        region: Region of the bucket; only for `s3://`.

    Raises:
        ValueError: The address is neither of the two.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ValueError(f"the object store's address must be s3://BUCKET/PREFIX, got {url!r}")
        return S3Store(parts.netloc, parts.path.strip("/"), endpoint_url=endpoint_url, region=region)
    if url.startswith("/"):
        return DirectoryStore(Path(url))
    raise ValueError(f"the object store must be an absolute folder or s3://BUCKET/PREFIX, got {url!r}")
