"""The collector on SQLite and a folder."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from service.db.tables import JobRow
from service.dispatch.loop import dispatch
from service.dispatch.tracker import Tracker
from service.domain.names import SHARED, job_prefix, log_prefix
from service.jobs import garbage
from service.settings import Settings
from service.store.base import Entries, StoreError, Uploads
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.garbage_contract import GarbageContract
from tests.fakes.garbage_scene import AFTER_S, collector, commit, failed, named, running, steps, stored
from tests.fakes.stepping_store import SteppingStore
from tests.unit.service.store_contract import Begin
from tests.unit.service.test_store import leave_half


@pytest.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlPlane]:
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # as for the database: no power is lost here
    async with control_plane(tmp_path) as made:
        # Writes that never ended have the store's own time.
        made.now, made.store = datetime.now(UTC), SteppingStore(made.store)
        yield made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the collector told; other tests may have made others talk."""
    names = ("service.dispatch.garbage", "service.dispatch.troubles")
    return [record.getMessage() for record in caplog.records if record.name in names]


class TestCollector(GarbageContract):
    @pytest.fixture
    def begin(self, tmp_path: Path) -> Begin:
        return partial(leave_half, tmp_path / "objects")


async def test_log__one_line_for_each_job_that_lost_something(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await running(plane), await running(plane)
    await commit(plane, first, 1, 10, 20, 30)
    await commit(plane, second, 1, 10)
    caplog.set_level(logging.INFO, logger="service.dispatch.garbage")
    for _ in range(2):
        await collector(plane).run_once()
    assert said(caplog) == [f"jobs/{first}: removed checkpoint at step 10; 2 files; 0.0 MB"]


async def test_store_away__costs_one_line_and_no_row_without_its_files(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await running(plane)
    await commit(plane, job_id, 1, 10, 20, 30)
    passes = collector(plane)

    def refuse(*_: object) -> None:
        raise StoreError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(plane.store, "delete", refuse)
        for _ in range(3):
            await passes.run_once()
    told = "what it left behind cannot be removed: StoreError: refused"
    assert said(caplog) == [f"job {job_id}: {told}"]
    reason = (await plane.job(job_id)).reason
    assert reason == (
        "what it left behind cannot be removed (3 tries failed, others follow): StoreError: refused"
    )
    plane.advance(130)
    assert await named(plane, job_id) < stored(plane, job_id)
    await passes.run_once()
    assert await named(plane, job_id) == stored(plane, job_id)
    assert await steps(plane, job_id) == [20, 30]
    assert (await plane.job(job_id)).reason == "attempt 1 is running"


async def test_store_away__is_told_once_and_costs_no_job_anything(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await running(plane)
    await commit(plane, job_id, 1, 10, 20, 30)

    def refuse(*_: object) -> None:
        raise StoreError("refused")

    monkeypatch.setattr(plane.store, "uploads", refuse)
    passes = collector(plane)
    for _ in range(4):
        await passes.run_once()
    assert said(caplog) == ["garbage waits: refused"]
    assert (await plane.job(job_id)).reason == "attempt 1 is running"


async def test_store_that_fails_for_three_jobs__is_asked_for_the_others_in_the_next_pass(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = sorted([await running(plane) for _ in range(5)])
    for job_id in ids:
        await commit(plane, job_id, 1, 10, 20, 30)
    look = plane.store.list

    def fail_for_three(prefix: str = "") -> Entries:
        if any(prefix.startswith(job_prefix(job_id)) for job_id in ids[:3]):
            raise StoreError("forbidden")
        return look(prefix)

    monkeypatch.setattr(plane.store, "list", fail_for_three)
    passes = collector(plane)
    for _ in range(4):
        await passes.run_once()
    assert [await steps(plane, job_id) for job_id in ids] == [[10, 20, 30]] * 3 + [[20, 30]] * 2


async def test_one_broken_job__does_not_stop_the_others(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = sorted([await running(plane), await running(plane)])
    for job_id in ids:
        await commit(plane, job_id, 1, 10, 20, 30)
    look = plane.store.list

    def fail_for_the_first(prefix: str = "") -> Entries:
        if prefix.startswith(job_prefix(ids[0])):
            raise RuntimeError("a bug")
        return look(prefix)

    monkeypatch.setattr(plane.store, "list", fail_for_the_first)
    await collector(plane).run_once()
    assert [await steps(plane, job_id) for job_id in ids] == [[10, 20, 30], [20, 30]]
    assert f"job {ids[0]}: what it left behind cannot be removed" in caplog.text


async def test_database_away__ends_the_pass_at_the_first_job(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await commit(plane, await running(plane), 1, 10, 20, 30)
    asked: list[object] = []

    async def away(*told: object, **_: object) -> None:
        asked.append(told)
        raise OperationalError("SELECT 1", {}, ConnectionError("refused"))

    monkeypatch.setattr(garbage, "sweep_job", away)
    with pytest.raises(OperationalError):
        await collector(plane).run_once()
    assert len(asked) == 1


async def test_jobs__all_are_found_in_several_reads(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "_JOBS_A_READ", 2)
    for num_jobs in range(6):
        assert len([job_id async for job_id in garbage.jobs(plane.sessions)]) == num_jobs
        await running(plane)


async def test_dispatcher__removes_garbage_although_ray_is_away(
    plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await running(plane)
    await commit(plane, job_id, 1, 10, 20, 30)
    settings = Settings(
        database_url="sqlite+aiosqlite:///none",
        store_url=str(tmp_path),
        ray_url="http://127.0.0.1:1",
        public_url="http://api:8000",
        secret=SecretStr("s" * 32),
        mlflow_url=None,
    )
    stop, loop, uploads = asyncio.Event(), asyncio.get_running_loop(), plane.store.uploads

    def end_of_a_pass(prefix: str = "") -> Uploads:
        if prefix == SHARED:
            loop.call_soon_threadsafe(stop.set)
        return uploads(prefix)

    def no_tracker(_: Settings) -> Tracker:
        raise AssertionError("MLflow is switched off")

    monkeypatch.setattr(plane.store, "uploads", end_of_a_pass)
    async with asyncio.timeout(60):
        await dispatch(settings, plane.sessions, plane.store, open_tracker=no_tracker, stop=stop)
    assert await steps(plane, job_id) == [20, 30]
    assert stored(plane, job_id) == await named(plane, job_id)


async def test_logs__of_an_attempt_that_still_writes_or_is_clean_are_not_even_listed(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await running(plane)
    await failed(plane, job_id, 1)
    plane.advance(2 * AFTER_S)
    await plane.report(job_id, 2)
    look, places = plane.store.list, list[str]()

    def listed(prefix: str = "") -> Entries:
        places.append(prefix)
        return look(prefix)

    monkeypatch.setattr(plane.store, "list", listed)
    await collector(plane).run_once()
    assert places == [f"{job_prefix(job_id)}/attempts", log_prefix(job_id, 1)]
    places.clear()
    async with plane.sessions.begin() as session:
        await session.execute(update(JobRow).values(clean_attempt=1))
    await collector(plane).run_once()
    assert places == [f"{job_prefix(job_id)}/attempts"]
