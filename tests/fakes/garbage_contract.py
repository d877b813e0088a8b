"""What removing garbage must do on every database and object store."""

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any

from service.contracts.jobs import JobState as S
from service.db import queries
from service.domain.names import job_prefix, submission_id
from service.jobs import garbage
from tests.fakes.control_plane import ControlPlane
from tests.fakes.garbage_scene import (
    AFTER_S,
    Cut,
    Scene,
    assigned,
    collector,
    commit,
    committed,
    dry_run,
    failed,
    inner,
    joined,
    named,
    notes,
    running,
    steps,
    stored,
)
from tests.fakes.launcher import CrashError
from tests.fakes.stepping_store import SteppingStore
from tests.unit.service.store_contract import Begin


class GarbageContract:
    """Subclasses give `plane`, whose store is a `SteppingStore`, and `begin`, as of the store's contract."""

    async def test_pass__removes_what_nothing_names_and_nothing_else(
        self, plane: ControlPlane, begin: Begin
    ) -> None:
        scene = await Scene().set(plane, begin)
        await collector(plane).run_once()
        await scene.assert_clean(plane)

    async def test_dry_run__says_the_same_and_touches_nothing(
        self, plane: ControlPlane, begin: Begin
    ) -> None:
        scene = await Scene().set(plane, begin)
        before = {job_id: stored(plane, job_id) for job_id in (scene.live, scene.ended)}
        told = {removed.place: removed for removed in await dry_run(plane)}
        assert {job_id: stored(plane, job_id) for job_id in before} == before
        assert await steps(plane, scene.live) == [10, 40, 50, 60]
        assert len(inner(plane).uploads()) == 3
        await collector(plane).run_once()
        for job_id, paths in before.items():
            removed = told[job_prefix(job_id)]
            gone = {f"{removed.place}/{path}" for path in paths - stored(plane, job_id)}
            assert set(removed.keys) == gone
            assert removed.num_uploads == 1
        assert told[job_prefix(scene.live)].steps == (10, 40)
        logs_bytes = len(joined(1)) * len(b"line\n")
        assert told[job_prefix(scene.ended)].size_bytes == 2 * len(b"weights") + 3 * len(b"left") + logs_bytes
        assert await dry_run(plane) == []

    async def test_killed__at_every_single_step_the_next_pass_finds_the_rest(
        self, plane: ControlPlane, begin: Begin
    ) -> None:
        at = 0
        while True:
            scene = await Scene().set(plane, begin)
            with Cut(plane, at=at) as cut:
                try:
                    await collector(plane).run_once()
                except CrashError:
                    await scene.assert_whole(plane)
            await collector(plane).run_once()
            await scene.assert_clean(plane)
            await _end(plane, scene)
            if not cut.happened:
                break
            at += 1
        assert at >= 20

    async def test_resume__during_a_pass_finds_its_checkpoint(self, plane: ControlPlane) -> None:
        job_id = await running(plane, resolved=_resolved(keep_last=1))
        await commit(plane, job_id, 1, 10, 20, 30)
        await failed(plane, job_id, 1)
        plane.advance(2 * AFTER_S)
        looks: list[int] = []

        async def look() -> None:
            checkpoint = (await assigned(plane, job_id, 2)).checkpoint
            assert checkpoint is not None
            assert {entry.path for entry in checkpoint.files} <= stored(plane, job_id)
            looks.append(checkpoint.step)

        await _at_each_step(plane, look)
        assert looks == [30] * 8  # three looks at the job, four deletions, one look at what jobs share
        assert await steps(plane, job_id) == [30]

    async def test_commits__beside_passes_keep_the_newest_whole(self, plane: ControlPlane) -> None:
        job_id = await running(plane, resolved=_resolved(keep_last=1))
        done = asyncio.Event()

        async def passes() -> None:
            while not done.is_set():
                await collector(plane).run_once()
                await asyncio.sleep(0)

        async def commits() -> None:
            for step in range(1, 13):
                await commit(plane, job_id, 1, step)
                checkpoint = (await assigned(plane, job_id, 1)).checkpoint
                assert checkpoint is not None
                assert checkpoint.step == step
                assert {entry.path for entry in checkpoint.files} <= stored(plane, job_id)
            done.set()

        async with asyncio.TaskGroup() as tasks:
            for work_of in (passes, passes, commits):
                tasks.create_task(work_of())
        await collector(plane).run_once()
        assert await steps(plane, job_id) == [12]
        assert stored(plane, job_id) == await named(plane, job_id)
        # Two passes that overlap tell of each removal once.
        assert _steps_of(await notes(plane, job_id)) == list(range(1, 12))

    async def test_commit__a_late_repetition_does_not_bring_a_removed_checkpoint_back(
        self, plane: ControlPlane
    ) -> None:
        job_id = await running(plane)
        await commit(plane, job_id, 1, 10)
        first = (await assigned(plane, job_id, 1)).checkpoint
        assert first is not None
        await commit(plane, job_id, 1, 20, 30)
        await collector(plane).run_once()
        await committed(plane, job_id, 1, first)
        for entry in first.files:  # even if its files were there again
            inner(plane).put_bytes(f"{job_prefix(job_id)}/{entry.path}", b"weights")
        await committed(plane, job_id, 1, first)
        assert await steps(plane, job_id) == [20, 30]

    async def test_keep_every__keeps_all_until_the_plan_is_known(self, plane: ControlPlane) -> None:
        resolved = _resolved(keep_last=1, keep_every={"epochs": 2.0})
        job_id = await running(plane, resolved=resolved)
        await commit(plane, job_id, 1, *range(10, 70, 10))
        await collector(plane).run_once()
        assert await steps(plane, job_id) == [10, 20, 30, 40, 50, 60]
        async with plane.sessions.begin() as session:
            job = await queries.job(session, job_id)
            assert job is not None
            # An epoch of 12.5 steps: multiples at 25 and 50.
            job.resolved = {**resolved, "plan": {"batch_size": 8, "num_images": 100, "total_steps": 60}}
        await collector(plane).run_once()
        assert await steps(plane, job_id) == [30, 50, 60]

    async def test_finished__is_looked_at_until_the_cluster_runs_it_no_longer(
        self, plane: ControlPlane
    ) -> None:
        job_id = await running(plane)
        await plane.finish(job_id, 1)
        plane.advance(2 * AFTER_S)
        await collector(plane).run_once()
        plane.put(job_id, "attempts/1/checkpoints/step-9/state", b"by a process that woke up")
        assert [removed.num_uploads for removed in await dry_run(plane)] == [0]
        plane.launcher.jobs.pop(submission_id(job_id, 1))
        await plane.reconciler().run_once()
        await collector(plane).run_once()
        assert stored(plane, job_id) == {"result.json"}
        assert [i async for i in garbage.jobs(plane.sessions)] == []

    async def test_grace__leftovers_of_an_attempt_stay_as_long(self, plane: ControlPlane) -> None:
        job_id = await running(plane)
        await commit(plane, job_id, 1, 10, 20, 30)
        plane.put(job_id, "attempts/1/checkpoints/step-40/state", b"never committed")
        await plane.finish(job_id, 1, outcome="failed", failure={"kind": "user", "message": "too few images"})
        plane.advance(AFTER_S - 1)
        await collector(plane).run_once()
        assert await steps(plane, job_id) == [20, 30]
        assert len(stored(plane, job_id)) == 5
        plane.advance(1)
        await collector(plane).run_once()
        assert stored(plane, job_id) == await named(plane, job_id)
        assert (await plane.job(job_id)).state is S.FAILED

    async def test_silent__an_attempt_that_may_still_write_loses_nothing(
        self, plane: ControlPlane, begin: Begin
    ) -> None:
        job_id = await running(plane)
        await commit(plane, job_id, 1, 10)
        plane.put(job_id, "attempts/1/checkpoints/step-20/state", b"under way")
        begin(f"{job_prefix(job_id)}/attempts/1/checkpoints/step-20/manifest.json", b"half")
        plane.advance(2 * AFTER_S)
        await collector(plane).run_once()
        assert len(stored(plane, job_id)) == 3
        assert len(inner(plane).uploads()) == 1

    async def test_shared__writes_that_never_ended_go(self, plane: ControlPlane, begin: Begin) -> None:
        begin("tokenizers/dall-e/ab/model.safetensors", b"half")
        inner(plane).put_bytes("tokenizers/dall-e/ab/config.json", b"{}")
        await collector(plane).run_once()
        assert len(inner(plane).uploads()) == 1
        plane.advance(2 * AFTER_S)
        await collector(plane).run_once()
        assert inner(plane).uploads() == []
        assert [entry.key for entry in inner(plane).list()] == ["tokenizers/dall-e/ab/config.json"]


async def _at_each_step(plane: ControlPlane, look: Callable[[], Any]) -> None:
    """One pass, with `look` awaited before each of its steps in the object store."""
    loop = asyncio.get_running_loop()
    assert isinstance(plane.store, SteppingStore)

    def on_step() -> None:
        asyncio.run_coroutine_threadsafe(look(), loop).result(timeout=60)

    plane.store.on_step = on_step
    await collector(plane).run_once()
    plane.store.on_step = lambda: None


async def _end(plane: ControlPlane, scene: Scene) -> None:
    """Make room for the next scene."""
    await plane.finish(scene.live, 2, step=70, total_steps=70)
    plane.launcher.forget_everything()
    await plane.reconciler().run_once()
    plane.advance(2 * AFTER_S)
    await collector(plane).run_once()
    assert [job_id async for job_id in garbage.jobs(plane.sessions)] == []


def _resolved(**checkpoints: Any) -> dict[str, Any]:
    resources = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1}
    return {"kind": "tokenizer", "name": "job", "resources": resources, "checkpoints": checkpoints}


def _steps_of(told: Iterable[str]) -> list[int]:
    return sorted(int(step) for note in told for step in re.findall(r"\d+", note))
