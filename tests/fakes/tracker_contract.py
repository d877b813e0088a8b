"""What every tracker must do: run against the fake in the unit tier and against MLflow in integration."""

import io
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest
from PIL import Image

from service.dispatch.tracker import MAX_BATCH, NewRun, Outcome, Picture, Point, Tracker, TrackerRefusedError

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Record(Protocol):
    """Looks at a run as a person would, by another way than the tracker's own."""

    def points(self, run_id: str) -> Mapping[tuple[str, int], list[float]]:
        """All values of each curve and step."""
        ...

    def pictures(self, run_id: str) -> list[tuple[str, int]]:
        """Series and step of every picture."""
        ...

    def status(self, run_id: str) -> tuple[str, str]:
        """Status and description."""
        ...

    def params(self, run_id: str) -> Mapping[str, str]:
        """What the run says of its settings."""
        ...

    def double(self, run_id: str) -> str:
        """Make another run of the same job, which nobody names; returns its id."""
        ...

    def is_listed(self, run_id: str) -> bool:
        """Whether a person still sees it among the runs."""
        ...

    def delete(self, run_id: str) -> None:
        """What a user may do at any time."""
        ...


def new_run(**changes: object) -> NewRun:
    """A run under a new job id."""
    params = {f"model.key{n}": str(n) for n in range(150)}
    return NewRun(
        job_id=secrets.token_hex(8),
        name="street",
        started_at=AT,
        description="**first**",
        tags={"cim.kind": "pretrain"},
        params=params,
    )


def point(step: int, value: float) -> Point:
    """One point of the loss, with its own moment."""
    return Point(key="respix/loss", step=step, value=value, at=AT + timedelta(seconds=step))


def png(colour: str) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


class TrackerContract:
    """Inherit, and give the fixtures `tracker` and `record`."""

    async def test_ensure_run__twice_gives_one_run(self, tracker: Tracker, record: Record) -> None:
        run = new_run()
        run_id = await tracker.ensure_run(run)
        assert await tracker.ensure_run(run) == run_id
        assert await tracker.ensure_run(new_run()) != run_id
        assert record.status(run_id) == ("RUNNING", "**first**")

    async def test_points__all_arrive_once_also_when_sent_twice(
        self, tracker: Tracker, record: Record
    ) -> None:
        run_id = await tracker.ensure_run(new_run())
        points = [point(step, step / 8) for step in range(MAX_BATCH)]
        await tracker.log_points(run_id, points)
        await tracker.log_points(run_id, points[-10:])
        expected = {("respix/loss", step): [step / 8] for step in range(MAX_BATCH)}
        assert dict(record.points(run_id)) == expected

    async def test_picture__is_there_once_a_step(self, tracker: Tracker, record: Record) -> None:
        run_id = await tracker.ensure_run(new_run())
        for step, colour in ((10, "red"), (10, "red"), (100, "blue")):
            picture = Picture(series="samples", step=step, png=png(colour), at=AT)
            await tracker.log_picture(run_id, picture)
        assert record.pictures(run_id) == [("samples", 10), ("samples", 100)]

    @pytest.mark.parametrize("outcome", list(Outcome))
    async def test_close__sets_the_status_and_may_be_repeated(
        self, tracker: Tracker, record: Record, outcome: Outcome
    ) -> None:
        run_id = await tracker.ensure_run(new_run())
        for _ in range(2):
            await tracker.close(run_id, outcome, ended_at=AT, description="**last**")
        assert record.status(run_id) == (outcome, "**last**")

    async def test_ensure_run__opens_the_run_of_a_job_that_goes_on(
        self, tracker: Tracker, record: Record
    ) -> None:
        run = new_run()
        run_id = await tracker.ensure_run(run)
        await tracker.close(run_id, Outcome.FAILED, ended_at=AT, description="**last**")
        assert await tracker.ensure_run(run) == run_id
        assert record.status(run_id)[0] == "RUNNING"

    async def test_ensure_run__of_a_job_whose_settings_changed_keeps_those_it_has(
        self, tracker: Tracker, record: Record
    ) -> None:
        run = new_run()
        run_id = await tracker.ensure_run(run)
        await tracker.close(run_id, Outcome.FAILED, ended_at=AT, description="**last**")
        changed = replace(run, params={**run.params, "model.key149": "other", "plan.total_steps": "7"})
        assert await tracker.ensure_run(changed) == run_id
        assert record.status(run_id)[0] == "RUNNING"
        assert dict(record.params(run_id)) == {**run.params, "plan.total_steps": "7"}

    async def test_abandon__ends_every_open_run_of_the_job_and_may_be_repeated(
        self, tracker: Tracker, record: Record
    ) -> None:
        run, other = new_run(), await tracker.ensure_run(new_run())
        run_id = await tracker.ensure_run(run)
        double = record.double(run_id)
        for _ in range(2):
            await tracker.abandon(run.job_id, Outcome.KILLED, ended_at=AT, description="**no more**")
        assert record.status(run_id) == record.status(double) == ("KILLED", "**no more**")
        assert record.status(other)[0] == "RUNNING"

    async def test_abandon__leaves_what_has_ended_or_is_deleted(
        self, tracker: Tracker, record: Record
    ) -> None:
        run = new_run()
        run_id = await tracker.ensure_run(run)
        double = record.double(run_id)
        record.delete(double)
        await tracker.close(run_id, Outcome.FINISHED, ended_at=AT, description="**last**")
        await tracker.abandon(run.job_id, Outcome.KILLED, ended_at=AT, description="**no more**")
        assert record.status(run_id) == ("FINISHED", "**last**")
        assert not record.is_listed(double)

    async def test_deleted_run__is_refused_for_ever(self, tracker: Tracker, record: Record) -> None:
        run_id = await tracker.ensure_run(new_run())
        record.delete(run_id)
        with pytest.raises(TrackerRefusedError):
            await tracker.log_points(run_id, [point(1, 1.0)])

    async def test_keep_only__leaves_one_run_of_the_job_and_those_of_others(
        self, tracker: Tracker, record: Record
    ) -> None:
        run, other_job = new_run(), await tracker.ensure_run(new_run())
        run_id = await tracker.ensure_run(run)
        doubles = [record.double(run_id) for _ in range(2)]
        for _ in range(2):
            await tracker.keep_only(run_id, job_id=run.job_id)
        assert record.is_listed(run_id)
        assert record.is_listed(other_job)
        assert not any(record.is_listed(double) for double in doubles)
