import time
from pathlib import Path

import pyarrow.fs
import pytest

from service.contracts.work import Assignment, StoreAddress
from service.store.base import StoreError, StoreFullError
from workers.storage import JobStore, patiently, ray_storage


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_patiently__an_outage_costs_waiting(pauses: list[float]) -> None:
    answers = iter([StoreError("away"), StoreError("away"), None])

    def action() -> str:
        if (answer := next(answers)) is not None:
            raise answer
        return "done"

    assert patiently(action, what="writing") == "done"
    assert pauses == [1.0, 2.0]


def test_patiently__gives_up_in_the_end(pauses: list[float]) -> None:
    def action() -> None:
        raise StoreError("away")

    with pytest.raises(StoreError):
        patiently(action, what="writing")
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_patiently__a_full_store_is_not_waited_for(pauses: list[float]) -> None:
    def action() -> None:
        raise StoreFullError("full")

    with pytest.raises(StoreFullError):
        patiently(action, what="writing")
    assert pauses == []


def test_put_folder__paths_are_relative_to_the_job(tmp_path: Path) -> None:
    address = StoreAddress(url=str(tmp_path / "store"))
    store = JobStore.of(Assignment(job_id="ab12", attempt=1, spec={}, inputs={}, store=address))
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/a.txt").write_text("a")
    (tmp_path / "out/deep/b.txt").write_text("bb")
    entries = store.put_folder("encoder", tmp_path / "out")
    assert [(entry.path, entry.size) for entry in entries] == [
        ("encoder/a.txt", 1),
        ("encoder/deep/b.txt", 2),
    ]
    # sha256 of the one byte "a", from FIPS 180 implementations everywhere.
    assert entries[0].sha256 == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert (tmp_path / "store/jobs/ab12/encoder/deep/b.txt").read_text() == "bb"


def test_ray_storage__directory() -> None:
    assert ray_storage(StoreAddress(url="/data/store/"), prefix="jobs/a/attempts/1/ray") == (
        "/data/store/jobs/a/attempts/1/ray",
        None,
    )


def test_ray_storage__s3_with_an_endpoint() -> None:
    address = StoreAddress(url="s3://bucket/below", endpoint_url="http://127.0.0.1:9000", region="eu-1")
    path, filesystem = ray_storage(address, prefix="jobs/a")
    assert path == "bucket/below/jobs/a"
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem)
    assert filesystem.region == "eu-1"
