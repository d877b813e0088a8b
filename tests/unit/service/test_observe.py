"""The dispatcher's reads."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.dispatch import observe
from tests.fakes.control_plane import ControlPlane, control_plane


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def test_open_jobs__the_portions_in_which_they_are_read_do_not_matter(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = [await plane.submit(f"first-{n}") for n in range(5)]
    for n in range(5):
        await plane.submit(f"next-{n}", inputs_wait=needed[n:], priority=n)
    for _ in range(2):
        await plane.reconciler().run_once()
        plane.launcher.forget_everything()  # so that there are second attempts
        plane.advance(30)
    await plane.submit("orphan", inputs_wait=["0" * 16])
    whole = await observe.open_jobs(plane.sessions, now=plane.now)
    assert len(whole.jobs) == 11
    assert {needs.name for job in whole.jobs for needs in job.job.dependencies} > {"deleted", "first-4"}
    assert any(job.job.attempt for job in whole.jobs)
    monkeypatch.setattr(observe, "_ROWS_A_TURN", 2)
    assert await observe.open_jobs(plane.sessions, now=plane.now) == whole
