"""What one job's errors cost: its own turn, a line in the log, and after a while a sentence for its user."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from service.contracts.jobs import JobState as S
from service.db import leases
from service.db.leases import GuardedSessions, LeaseLostError
from service.db.tables import EventRow
from service.dispatch import observe
from service.dispatch.launcher import LauncherUnavailableError
from service.dispatch.observe import Observed
from service.dispatch.troubles import RESTS_S, TOLD_AFTER, Troubles
from service.domain.decide import ClusterState
from service.domain.names import submission_id
from service.domain.wishes import Verb
from service.jobs.wishes import ask
from tests.fakes import poison
from tests.fakes.control_plane import ControlPlane, control_plane

TOLD = "it cannot go on (3 tries failed, others follow): ValueError: no such thing"
BUSY = OperationalError("UPDATE jobs", {}, type("Busy", (Exception,), {"sqlite_errorcode": 5})("locked"))


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


def troubles_of(plane: ControlPlane) -> Troubles:
    return Troubles(
        GuardedSessions(sessions=plane.sessions, lease=plane.lease),
        what="it cannot go on",
        clock=lambda: plane.now,
        monotonic=lambda: plane.now.timestamp(),
    )


async def passes(troubles: Troubles, job_id: str, *errors: Exception | None) -> None:
    for error in errors:
        troubles.begin()
        async with troubles.turn(job_id):
            if error is not None:
                raise error
        await troubles.end()


async def told(plane: ControlPlane, job_id: str) -> list[str]:
    """Events that are no moves."""
    query = select(EventRow.message).where(EventRow.job_id == job_id, EventRow.dst.is_(None))
    async with plane.sessions.begin() as session:
        return list(await session.scalars(query))


async def test_error__is_logged_once_and_told_after_a_few_times(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    await passes(troubles, job_id, *[ValueError("no such thing")] * (TOLD_AFTER - 1))
    assert (await plane.job(job_id)).reason == ""
    await passes(troubles, job_id, *[ValueError("no such thing")] * 3)
    assert (await plane.job(job_id)).reason == TOLD
    assert await told(plane, job_id) == [TOLD]
    (record,) = [r for r in caplog.records if r.name == "service.dispatch.troubles"]
    assert record.getMessage() == f"job {job_id}: it cannot go on: ValueError: no such thing"
    assert record.exc_info is not None


async def test_success__takes_the_sentence_back(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    await plane.reconciler().run_once()
    await plane.report(job_id, 1)
    await passes(troubles, job_id, *[ValueError("no such thing")] * TOLD_AFTER)
    assert (await plane.job(job_id)).reason == TOLD
    await passes(troubles, job_id, None)
    assert (await plane.job(job_id)).reason == "attempt 1 is running"
    assert troubles.resting == frozenset()


async def test_success__after_a_chance_failure_begins_the_count_again(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    for _ in range(4):
        await passes(troubles, job_id, ValueError("no such thing"), ValueError("no such thing"), None)
    assert await told(plane, job_id) == []


async def test_success__of_another_part_of_the_turn_is_none(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    for _ in range(TOLD_AFTER):
        troubles.begin()
        for error in (None, ValueError("no such thing"), None):
            async with troubles.turn(job_id):
                if error is not None:
                    raise error
        await troubles.end()
    assert (await plane.job(job_id)).reason == TOLD


async def test_reason__of_a_final_job_stays_and_an_event_tells(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    async with plane.sessions.begin() as session:
        await ask(session, job_id, Verb.CANCEL, now=plane.now)
    await passes(troubles, job_id, *[ValueError("no such thing")] * TOLD_AFTER)
    assert (await plane.job(job_id)).reason == "cancelled by the user"
    assert await told(plane, job_id) == [TOLD]


async def test_reason__that_somebody_has_written_meanwhile_stays(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    await passes(troubles, job_id, *[ValueError("no such thing")] * TOLD_AFTER)
    async with plane.sessions.begin() as session:
        await ask(session, job_id, Verb.PAUSE, now=plane.now)
    await passes(troubles, job_id, None)
    assert (await plane.job(job_id)).reason == "paused by the user"


async def test_rest__begins_when_it_is_no_chance_and_grows(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    await passes(troubles, job_id, *[ValueError("no such thing")] * (TOLD_AFTER - 1))
    assert troubles.resting == frozenset()
    rests = []
    for _ in range(10):
        await passes(troubles, job_id, ValueError("no such thing"))
        began = plane.now
        while job_id in troubles.resting:
            plane.advance(0.5)
        rests.append((plane.now - began).total_seconds())
    assert rests == [min(RESTS_S[0] * 2**n, RESTS_S[1]) for n in range(10)]


async def test_foreseen__needs_no_traceback(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    await passes(troubles, job_id, LauncherUnavailableError("Ray did not take it"))
    (record,) = [r for r in caplog.records if r.name == "service.dispatch.troubles"]
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)


async def test_text__is_one_that_databases_take_and_holds_no_secret(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    error = LauncherUnavailableError(
        "a\x00b\ud800 s3://AKIAIOSFODNN7EXAMPLE:pass@bucket/x\nsecond line" + "x" * 9999
    )
    await passes(troubles, job_id, *[error] * TOLD_AFTER)
    (text,) = await told(plane, job_id)
    assert "a\ufffdb\\ud800" in text
    assert "AKIA" not in text
    assert "second line" not in text


@pytest.mark.parametrize(
    "error",
    [LeaseLostError("lost"), OperationalError("SELECT 1", {}, ConnectionError("refused"))],
    ids=["lease", "database"],
)
async def test_end_of_the_pass__is_what_concerns_everybody(plane: ControlPlane, error: Exception) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    with pytest.raises(type(error)):
        await passes(troubles, job_id, error)


async def test_contention__at_one_or_two_jobs_is_theirs_and_at_more_everybodys(plane: ControlPlane) -> None:
    jobs, troubles = [await plane.submit() for _ in range(3)], troubles_of(plane)
    for _ in range(2):
        troubles.begin()
        for job_id in jobs[:2]:
            async with troubles.turn(job_id):
                raise BUSY
        with pytest.raises(OperationalError):
            async with troubles.turn(jobs[2]):
                raise BUSY


async def test_sentence__that_cannot_be_written_ends_nothing(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    troubles = troubles_of(plane)
    await passes(troubles, "no such job", *[ValueError("no such thing")] * TOLD_AFTER)  # no row, so no event
    assert "its reason could not be written" in caplog.text


async def test_lease__that_is_lost_is_noticed_before_a_sentence_is_written(plane: ControlPlane) -> None:
    job_id, troubles = await plane.submit(), troubles_of(plane)
    async with plane.sessions.begin() as session:
        await leases.release(session, plane.lease)
    with pytest.raises(LeaseLostError):
        await passes(troubles, job_id, *[ValueError("no such thing")] * TOLD_AFTER)
    assert await told(plane, job_id) == []


async def test_reconciler__tells_whose_row_cannot_be_read(plane: ControlPlane) -> None:
    poisoned, healthy = await plane.submit(), await plane.submit()
    await poison.plant(plane.sessions, "jobs.inputs_wait", poisoned, '"text"')
    reconciler = plane.reconciler()
    for _ in range(TOLD_AFTER):
        await reconciler.run_once()
    assert (await plane.job(healthy)).state is S.LAUNCHING
    assert (await plane.job(poisoned)).state is S.QUEUED
    assert (await plane.job(poisoned)).reason == (
        "the dispatcher cannot go on with it (3 tries failed, others follow): TypeError: inputs_wait must be "
        "a list of ids, got 'text'"
    )
    await poison.plant(plane.sessions, "jobs.inputs_wait", poisoned, "[]")
    plane.advance(2)
    await reconciler.run_once()
    assert (await plane.job(poisoned)).state is S.LAUNCHING


async def test_reconciler__ends_an_unreadable_job_that_its_user_has_cancelled(plane: ControlPlane) -> None:
    job_id = await plane.submit()
    reconciler = plane.reconciler()
    await reconciler.run_once()
    await plane.report(job_id, 1)
    await poison.plant(plane.sessions, "attempts.started_at", job_id, "poison")
    async with plane.sessions.begin() as session:
        await ask(session, job_id, Verb.CANCEL, now=plane.now)
    for _ in range(TOLD_AFTER):
        await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.CANCELLED
    await poison.plant(plane.sessions, "attempts.started_at", job_id, "2026-01-01 00:00:00.000000")
    plane.advance(100)
    await reconciler.run_once()
    assert plane.launcher.jobs[submission_id(job_id, 1)].state is ClusterState.STOPPED


async def test_unreadable_rows__cost_a_look_at_each_of_them_only_now_and_then(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(20):
        await poison.plant(plane.sessions, "jobs.created_at", await plane.submit(), "poison")
    looks: list[object] = []
    inner = observe._read

    async def counted(*args: Any, **kwargs: Any) -> list[Observed]:
        looks.append(args)
        return await inner(*args, **kwargs)

    monkeypatch.setattr(observe, "_read", counted)
    reconciler = plane.reconciler()
    for _ in range(TOLD_AFTER):
        await reconciler.run_once()
    looks.clear()
    for _ in range(5):
        await reconciler.run_once()
    assert len(looks) == 5  # while they rest, one read for all the others
