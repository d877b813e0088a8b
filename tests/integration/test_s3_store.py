"""The object store on a real S3 server (moto), in a process of its own, over HTTP."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest

from service.store import Entry, MissingObjectError, ObjectStore, StoreError, open_store
from service.store.s3 import PART_BYTES, S3Store
from tests.unit.service.store_contract import Begin, StoreContract

BUCKET = "pictures"
READY_WITHIN_S = 60


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait_for(f"http://127.0.0.1:{port}/moto-api/", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="module")
def client(endpoint: str) -> Iterator[Any]:
    """Speaks to the server beside the store under test; making one takes a second."""
    client = boto3.Session("test", "test").client("s3", endpoint_url=endpoint, region_name="us-east-1")
    yield client
    client.close()


@pytest.fixture
def bucket(endpoint: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Client of an empty bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    reset = urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=30).close()
    client.create_bucket(Bucket=BUCKET)
    return client


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, endpoint: str, bucket: Any) -> ObjectStore:
        return open_store(f"s3://{BUCKET}/team a/cim", endpoint_url=endpoint)

    @pytest.fixture
    def begin(self, bucket: Any) -> Begin:
        def leave(key: str, data: bytes) -> None:
            name = f"team a/cim/{key}"
            upload = bucket.create_multipart_upload(Bucket=BUCKET, Key=name)["UploadId"]
            bucket.upload_part(Bucket=BUCKET, Key=name, UploadId=upload, PartNumber=1, Body=data)

        return leave


@pytest.fixture
def store(endpoint: str, bucket: Any) -> ObjectStore:
    return open_store(f"s3://{BUCKET}/cim", endpoint_url=endpoint)


def test_keys__lie_below_the_prefix_of_the_address(store: ObjectStore, bucket: Any) -> None:
    bucket.put_object(Bucket=BUCKET, Key="cimx/other", Body=b"")
    bucket.put_object(Bucket=BUCKET, Key="outside", Body=b"")
    store.put_bytes("jobs/a", b"x")
    found = {item["Key"] for item in bucket.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert found == {"cim/jobs/a", "cimx/other", "outside"}
    assert [entry.key for entry in store.list()] == ["jobs/a"]


def test_keys__a_whole_bucket_is_a_store_too(endpoint: str, bucket: Any) -> None:
    store = open_store(f"s3://{BUCKET}", endpoint_url=endpoint)
    store.put_bytes("jobs/a", b"x")
    assert store.list() == store.list("jobs") == [Entry("jobs/a", 1)]
    assert bucket.get_object(Bucket=BUCKET, Key="jobs/a")["Body"].read() == b"x"


def test_list__folder_markers_are_no_objects(store: ObjectStore, bucket: Any) -> None:
    bucket.put_object(Bucket=BUCKET, Key="cim/jobs/a/", Body=b"")
    store.put_bytes("jobs/a/x", b"")
    assert [entry.key for entry in store.list("jobs")] == ["jobs/a/x"]


def test_uploads__below_another_prefix_are_not_ours(store: ObjectStore, bucket: Any) -> None:
    bucket.create_multipart_upload(Bucket=BUCKET, Key="cimx/other")
    upload = bucket.create_multipart_upload(Bucket=BUCKET, Key="cim/jobs/a/x")["UploadId"]
    assert [(one.key, one.id, one.size) for one in store.uploads()] == [("jobs/a/x", upload, 0)]


def test_uploads__a_writer_whose_upload_was_aborted_may_try_again(
    store: ObjectStore, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "large"
    source.write_bytes(bytes(PART_BYTES + 1))
    client = store._client  # type: ignore[attr-defined]
    complete = client.complete_multipart_upload

    def too_late(**given: Any) -> Any:
        store.abort(*store.uploads())
        return complete(**given)

    with monkeypatch.context() as patch:
        patch.setattr(client, "complete_multipart_upload", too_late)
        with pytest.raises(StoreError):
            store.put_file("large", source)
    store.put_file("large", source)
    assert store.uploads() == []
    assert store.list() == [Entry("large", PART_BYTES + 1)]


def test_list_and_delete__go_beyond_one_page(store: ObjectStore, bucket: Any) -> None:
    for index in range(1003):  # S3 lists and deletes 1000 at once
        bucket.put_object(Bucket=BUCKET, Key=f"cim/many/{index:04d}", Body=b"")
    store.put_bytes("kept", b"")
    assert [entry.key for entry in store.list("many")] == [f"many/{index:04d}" for index in range(1003)]
    store.delete_prefix("many")
    assert [entry.key for entry in store.list()] == ["kept"]


def test_put_file__a_large_file_travels_in_parts(store: ObjectStore, bucket: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "large", tmp_path / "back"
    source.write_bytes(b"0123456789abcdef" * (PART_BYTES // 16) + b"the end")
    store.put_file("large", source)
    assert bucket.head_object(Bucket=BUCKET, Key="cim/large")["ETag"].strip('"').endswith("-2")  # two parts
    store.get_file("large", target)
    assert target.read_bytes() == source.read_bytes()


def test_presign__anyone_may_get_the_bytes(store: ObjectStore) -> None:
    store.put_bytes("a b/ü.png", b"picture")
    url = store.presign("a b/ü.png", expires_s=60)
    assert url is not None
    assert "X-Amz-Expires=60" in url
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == b"picture"


def test_errors__a_missing_bucket_is_named(endpoint: str, bucket: Any) -> None:
    store = open_store("s3://no-such-bucket/x", endpoint_url=endpoint)
    calls = (store.list, partial(store.put_bytes, "k", b""), partial(store.get_bytes, "k"))
    for call in calls:
        with pytest.raises(StoreError, match="no-such-bucket"):
            call()


def test_errors__a_missing_object_differs_from_a_broken_store(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError):
        store.get_file("none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_errors__a_server_that_is_away_is_a_store_error(bucket: Any, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x")
    away = S3Store("bucket", endpoint_url="http://127.0.0.1:1", region="us-east-1")
    calls: list[Callable[[], object]] = [
        partial(away.put_bytes, "k", b""),
        partial(away.put_file, "k", source),
        partial(away.stat, "k"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:1"):
            call()


def test_errors__missing_credentials_are_a_store_error(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StoreError, match="credentials"):
        open_store(f"s3://{BUCKET}", endpoint_url=endpoint).list()
