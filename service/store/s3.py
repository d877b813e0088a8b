"""An object store in an S3 bucket, or in any server that speaks S3. Credentials: `AWS_...`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.store.base import (
    CHUNK_BYTES,
    Entries,
    Entry,
    MissingObjectError,
    ObjectStore,
    StoreError,
    StoreFullError,
    Upload,
    Uploads,
    check_key,
    check_prefix,
)

PART_BYTES = 16 << 20
DELETE_AT_ONCE = 1000  # S3's limit
MISSING = {"404", "NoSuchKey", "NotFound"}
FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XAmzQuotaExceeded"}


class _UploadEndedError(StoreError):
    """An upload became an object, or was aborted: a later look or try will see which."""


class S3Store(ObjectStore):
    """Objects below one prefix of one bucket; large files travel in parts."""

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None, region: str | None = None
    ) -> None:
        self._bucket, self._prefix = bucket, check_prefix(prefix)
        # The default session is shared by the process; making clients from it is not thread-safe.
        self._client: Any = boto3.Session().client(
            "s3", endpoint_url=endpoint_url, region_name=region, config=_config(endpoint_url)
        )
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
        )

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store `data` under `key`."""
        name = self._name(key)
        with self._explained(key):
            self._client.put_object(Bucket=self._bucket, Key=name, Body=data)

    def put_file(self, key: str, path: Path) -> None:
        """Store the local file `path` under `key`, in parts when it is large."""
        name = self._name(key)
        with self._explained(key):
            self._client.upload_file(str(path), self._bucket, name, Config=self._transfer)

    def get_file(self, key: str, path: Path) -> None:
        """Write the object to the local file `path`, whole or not at all; its folder is made."""
        name = self._name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(key):
            self._client.download_file(self._bucket, name, str(path), Config=self._transfer)

    def read(self, key: str) -> Iterator[bytes]:
        """The object in chunks. A missing object raises here, not at the first chunk."""
        name = self._name(key)
        with self._explained(key):
            body = self._client.get_object(Bucket=self._bucket, Key=name)["Body"]
        return self._chunks(key, body)

    def list(self, prefix: str = "") -> Entries:
        """Every object below `prefix`, by key; empty when there is none."""
        place = self._place(prefix)
        entries = []
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=place):
                entries += [self._entry(found) for found in page.get("Contents", ()) if _is_object(found)]
        return sorted(entries, key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        """Key and size, or None when there is no such object."""
        name = self._name(key)
        try:
            with self._explained(key):
                size = self._client.head_object(Bucket=self._bucket, Key=name)["ContentLength"]
        except MissingObjectError:
            return None
        return Entry(key, size)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these objects. One that is not there is fine; after a failure some may be left."""
        names = [self._name(key) for key in keys]
        for start in range(0, len(names), DELETE_AT_ONCE):
            self._delete_batch(names[start : start + DELETE_AT_ONCE])

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object below `prefix`. Nothing there is fine; an empty prefix is refused."""
        self.delete([entry.key for entry in self.list(check_key(prefix.removesuffix("/")))])

    def uploads(self, prefix: str = "") -> Uploads:
        """Every write below `prefix` that has not ended, by key: under way, or its writer was killed."""
        place = self._place(prefix)
        found = []
        with self._explained(prefix):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=place):
                # Not every server minds the prefix.
                begun = [one for one in page.get("Uploads", ()) if str(one["Key"]).startswith(place)]
                found += [upload for one in begun if (upload := self._upload(one)) is not None]
        return sorted(found, key=lambda upload: (upload.key, upload.id))

    def abort(self, upload: Upload) -> None:
        """End an upload without an object; its writer fails if it still lives. One that has ended is fine."""
        name = self._name(upload.key)
        try:
            with self._explained(upload.key):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload.id)
        except _UploadEndedError:
            return

    def presign(self, key: str, *, expires_s: int = 3600) -> str | None:
        """An address that anyone may GET for `expires_s` seconds."""
        params = {"Bucket": self._bucket, "Key": self._name(key)}
        with self._explained(key):
            return str(self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _place(self, prefix: str) -> str:
        """What the names of all objects below `prefix` begin with."""
        folder = "/".join(part for part in (self._prefix, check_prefix(prefix)) if part)
        return f"{folder}/" if folder else ""

    def _key(self, name: str) -> str:
        return name[len(self._prefix) + 1 :] if self._prefix else name

    def _entry(self, found: dict[str, Any]) -> Entry:
        return Entry(self._key(str(found["Key"])), int(found["Size"]))

    def _upload(self, begun: dict[str, Any]) -> Upload | None:
        name, number = str(begun["Key"]), str(begun["UploadId"])
        size, touched_at = 0, begun["Initiated"]
        try:
            with self._explained(name):
                pages = self._client.get_paginator("list_parts")
                for page in pages.paginate(Bucket=self._bucket, Key=name, UploadId=number):
                    for part in page.get("Parts", ()):
                        size, touched_at = size + part["Size"], max(touched_at, part["LastModified"])
        except _UploadEndedError:
            return None
        return Upload(self._key(name), number, size, touched_at)

    def _delete_batch(self, names: Sequence[str]) -> None:
        objects = [{"Key": name} for name in names]
        with self._explained(self._key(names[0])):
            answer = self._client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
            )
        if refused := answer.get("Errors"):
            first = refused[0]
            raise StoreError(
                f"{len(refused)} of {len(names)} objects were not deleted, "
                f"the first is {first.get('Key')!r}: {first.get('Message')}"
            )

    def _chunks(self, key: str, body: Any) -> Iterator[bytes]:
        with self._explained(key):
            try:
                yield from body.iter_chunks(CHUNK_BYTES)
            finally:
                body.close()

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._translated(key, error) from error

    def _translated(self, key: str, error: Exception) -> Exception:
        # The transfer manager hides the answer of the server in the context of its own error.
        cause = error if isinstance(error, ClientError) else error.__context__
        code = cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""
        where = f"s3://{self._bucket}/{self._prefix}".removesuffix("/")
        if code in MISSING:
            return MissingObjectError(f"there is no {key!r} in {where}")
        if code == "NoSuchUpload":
            return _UploadEndedError(f"the upload of {key!r} to {where} was ended by somebody else")
        if code == "NoSuchBucket":
            return StoreError(f"the bucket {self._bucket!r} does not exist; make it or correct CIM_STORE_URL")
        if code in FULL:
            return StoreFullError(f"no room for {key!r} in {where}: {error}")
        return StoreError(f"the object store {where} failed at {key!r}: {error}")


def _config(endpoint_url: str | None) -> Config:
    return Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        signature_version="s3v4",
        # Servers other than AWS seldom have a host name for each bucket, and some refuse AWS's
        # newer checksums in trailers. Manifests carry a SHA-256 of every file anyway.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _is_object(found: dict[str, Any]) -> bool:
    return not str(found["Key"]).endswith("/")  # "folders" that consoles and Ray leave behind
