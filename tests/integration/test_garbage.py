"""The collector on PostgreSQL and S3, and the command that does the same by hand."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from service.db.engine import create_engine, create_sessions
from service.db.upgrade import upgrade
from service.store import open_store
from service.store.directory import DirectoryStore
from tests.fakes.control_plane import ControlPlane, lease_of
from tests.fakes.garbage_contract import GarbageContract
from tests.fakes.garbage_scene import commit, named, running, steps, stored
from tests.fakes.stepping_store import SteppingStore
from tests.integration.servers import S3_KEYS
from tests.unit.service.store_contract import Begin

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One of this test's own."""

    name: str
    client: Any

    def begin(self, key: str, data: bytes) -> None:
        """What a writer leaves that is killed between two parts."""
        upload = self.client.create_multipart_upload(Bucket=self.name, Key=f"cim/{key}")["UploadId"]
        self.client.upload_part(Bucket=self.name, Key=f"cim/{key}", UploadId=upload, PartNumber=1, Body=data)


@pytest.fixture
def bucket(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)
    made = Bucket(name=f"garbage-{next(_numbers)}", client=boto3.client("s3", endpoint_url=s3_url))
    made.client.create_bucket(Bucket=made.name)
    return made


@pytest.fixture
async def plane(postgres_url: str, s3_url: str, bucket: Bucket) -> AsyncIterator[ControlPlane]:
    await asyncio.to_thread(upgrade, postgres_url)
    engine = create_engine(postgres_url)
    store = open_store(f"s3://{bucket.name}/cim", endpoint_url=s3_url, region="us-east-1")
    sessions = create_sessions(engine)
    yield ControlPlane(sessions, SteppingStore(store), await lease_of(sessions), now=datetime.now(UTC))
    await engine.dispose()


class TestCollector(GarbageContract):
    @pytest.fixture
    def begin(self, bucket: Bucket) -> Begin:
        return bucket.begin


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[tuple[Path, ControlPlane]]:
    """The data directory of an embedded service, and what it has done."""
    data_dir = tmp_path / ".cim"
    data_dir.mkdir()
    url = f"sqlite+aiosqlite:///{data_dir / 'cim.db'}"
    upgrade(url)
    engine = create_engine(url)
    store = SteppingStore(DirectoryStore(data_dir / "objects"))
    sessions, now = create_sessions(engine), datetime.now(UTC) - timedelta(hours=3)
    yield data_dir, ControlPlane(sessions, store, await lease_of(sessions), now=now)
    await engine.dispose()


def cim(*arguments: str, status: int = 0, **environ: str) -> str:
    """What `cim garbage` prints."""
    program = "from service.cli.main import main; main()"
    return printed("-c", program, "garbage", *arguments, status=status, environ=environ)


def printed(*arguments: str, status: int = 0, environ: Mapping[str, str]) -> str:
    """Standard output of a Python process, or standard error where it is to fail."""
    command, env = [sys.executable, *arguments], {**os.environ, **environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


async def test_command__shows_then_removes(folder: tuple[Path, ControlPlane]) -> None:
    data_dir, plane = folder
    job_id = await running(plane)
    await commit(plane, job_id, 1, 10, 20, 30)
    plane.put(job_id, "attempts/1/ray/run/snapshot.json", b"left")
    await plane.finish(job_id, 1)

    shown = cim("--data-dir", str(data_dir))
    assert f"jobs/{job_id}: checkpoint at step 10; 3 files; 0.0 MB" in shown
    assert "--delete does it" in shown
    assert await steps(plane, job_id) == [10, 20, 30]
    assert len(stored(plane, job_id)) == 8

    document = json.loads(cim("--delete", "--json", CIM_DATA_DIR=str(data_dir)))
    (removed,) = document["garbage"]
    assert (document["deleted"], removed["steps"], len(removed["keys"])) == (True, [10], 3)
    assert await steps(plane, job_id) == [20, 30]
    assert stored(plane, job_id) == await named(plane, job_id)
    assert cim("--data-dir", str(data_dir)) == "nothing to remove\n"


def test_command__a_folder_without_a_service_is_named_and_stays_as_it_is(tmp_path: Path) -> None:
    told = cim("--data-dir", str(tmp_path), status=1)
    assert f"no service has run on {tmp_path}" in told
    assert "--data-dir" in told
    assert list(tmp_path.iterdir()) == []


def test_command__another_schema_is_refused(tmp_path: Path) -> None:
    upgrade(f"sqlite+aiosqlite:///{tmp_path / 'cim.db'}", revision="0001")
    assert "the database is at revision 0001" in cim("--data-dir", str(tmp_path), status=1)


async def test_command__takes_other_places_from_the_environment(
    plane: ControlPlane, postgres_url: str, bucket: Bucket, s3_url: str
) -> None:
    places = {
        "CIM_DATABASE_URL": postgres_url,
        "CIM_STORE_URL": f"s3://{bucket.name}/cim",
        "CIM_S3_ENDPOINT_URL": s3_url,
        "CIM_S3_REGION": "us-east-1",
    }
    job_id = await running(plane)
    await commit(plane, job_id, 1, 10, 20, 30)
    document = json.loads(printed("-m", "service", "garbage", "--delete", "--json", environ=places))
    assert [removed["place"] for removed in document["garbage"]] == [f"jobs/{job_id}"]
    assert await steps(plane, job_id) == [20, 30]
    assert stored(plane, job_id) == await named(plane, job_id)
