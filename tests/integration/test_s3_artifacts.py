"""The API in front of a bucket, in a server that speaks S3 over HTTP."""

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import httpx
import pytest

from service.store import open_store
from tests.fakes.artifact_contract import ArtifactContract
from tests.fakes.work_contract import running
from tests.fakes.world import World, open_world
from tests.integration.servers import S3_KEYS

_numbers = itertools.count()


@pytest.fixture
async def world(
    database_url: str, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)
    bucket = f"artifacts-{next(_numbers)}"
    boto3.Session().client("s3", endpoint_url=s3_url).create_bucket(Bucket=bucket)
    store = open_store(f"s3://{bucket}/below", endpoint_url=s3_url, region="us-east-1")
    async with open_world(database_url, tmp_path, store=store) as opened:
        yield opened


class TestArtifacts(ArtifactContract): ...


async def test_fetch__the_presigned_address_opens_that_file_alone(world: World) -> None:
    job_id = await running(world)
    files = [world.file(job_id, name, name.encode()) for name in ("samples/a.bin", "samples/b.bin")]
    await world.report(job_id, 1, files=files)
    answer = await world.client.get(f"/v1/jobs/{job_id}/artifacts/samples/a.bin")
    address = answer.headers["location"]
    async with httpx.AsyncClient(trust_env=False) as outside:
        assert (await outside.get(address)).content == b"samples/a.bin"
    assert f"/below/jobs/{job_id}/samples/a.bin?" in address
    assert S3_KEYS["AWS_SECRET_ACCESS_KEY"] not in address.partition("?")[0]
