"""What every launcher must do: run against the fake in the unit tier and against Ray in integration."""

import asyncio
import secrets
import sys

from service.dispatch.launcher import Launcher, Submission
from service.domain.decide import ClusterJob, ClusterState

PATIENCE_S = 90


def submission(code: str, **env: str) -> Submission:
    """A Python one-liner under a new id."""
    return Submission(id=f"cim-{secrets.token_hex(8)}-1", command=[sys.executable, "-c", code], env=env)


async def ended(launcher: Launcher, submission_id: str) -> ClusterJob:
    """The job once its driver has ended."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            job = await launcher.status(submission_id)
            if job is not None and job.state.ended:
                return job
            await asyncio.sleep(0.2)


class LauncherContract:
    """Inherit, and give a `launcher` fixture."""

    async def test_submit__runs_the_command_with_its_environment(self, launcher: Launcher) -> None:
        job = submission("import os; print(os.environ['CIM_CLAIM_CODE'])", CIM_CLAIM_CODE="it's secret")
        await launcher.submit(job)
        assert (await ended(launcher, job.id)).state is ClusterState.SUCCEEDED
        assert "it's secret" in await launcher.log_tail(job.id, max_lines=100)

    async def test_submit__the_second_one_of_an_id_is_adopted(self, launcher: Launcher) -> None:
        job = submission("print('once')")
        await launcher.submit(job)
        await launcher.submit(job)
        await ended(launcher, job.id)
        await launcher.submit(job)
        assert (await launcher.log_tail(job.id, max_lines=100)).count("once") == 1

    async def test_status__a_failing_program_gives_its_exit_status(self, launcher: Launcher) -> None:
        job = submission("raise SystemExit(3)")
        await launcher.submit(job)
        end = await ended(launcher, job.id)
        assert (end.state, end.exit_code) == (ClusterState.FAILED, 3)

    async def test_status__an_unknown_submission_is_none(self, launcher: Launcher) -> None:
        assert await launcher.status("cim-never-1") is None
        assert await launcher.log_tail("cim-never-1", max_lines=5) == []

    async def test_stop__ends_a_running_job_and_may_be_repeated(self, launcher: Launcher) -> None:
        job = submission("import time; time.sleep(600)")
        await launcher.submit(job)
        running = await launcher.status(job.id)
        assert running is not None
        assert not running.state.ended
        await launcher.stop(job.id)
        assert (await ended(launcher, job.id)).state is ClusterState.STOPPED
        await launcher.stop(job.id)
        await launcher.stop("cim-never-1")

    async def test_capacity__counts_the_cluster(self, launcher: Launcher) -> None:
        assert (await launcher.capacity()).cpus >= 1
