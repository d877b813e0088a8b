"""Between two looks at the whole queue the dispatcher sees its head alone; the order stays the same."""

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.contracts.jobs import JobState as S
from service.dispatch import observe
from service.dispatch import reconciler as module
from service.dispatch.observe import Observation
from service.dispatch.reconciler import Reconciler
from service.domain.queueing import BEHIND
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.launcher import FakeLauncher


@pytest.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlPlane]:
    monkeypatch.setattr(module, "_QUEUE_HEAD", 3)
    async with control_plane(tmp_path) as made:
        made.launcher.total = FakeLauncher(cpus=1).total
        yield made


async def started(plane: ControlPlane, reconciler: Reconciler, jobs: list[str]) -> list[str]:
    """Which of the jobs the pass launched."""
    before = {i for i in jobs if (await plane.job(i)).state is S.QUEUED}
    await reconciler.run_once()
    return [i for i in jobs if i in before and (await plane.job(i)).state is S.LAUNCHING]


async def test_head__serves_the_queue_in_its_order(plane: ControlPlane) -> None:
    draw = random.Random(3)
    priorities = [draw.randrange(4) for _ in range(9)]
    jobs = [await plane.submit(f"job-{n}", priority=p) for n, p in enumerate(priorities)]
    in_order = sorted(jobs, key=lambda i: (-priorities[jobs.index(i)], jobs.index(i)))
    assert in_order != jobs
    reconciler = plane.reconciler()
    served = []
    for _ in jobs:
        (job_id,) = await started(plane, reconciler, jobs)
        served.append(job_id)
        await plane.report(job_id, 1)
        await plane.finish(job_id, 1)
    assert served == in_order


async def test_head__a_new_job_of_high_priority_is_seen_at_once(plane: ControlPlane) -> None:
    running, *_ = [await plane.submit(f"job-{n}") for n in range(8)]
    reconciler = plane.reconciler()
    await reconciler.run_once()
    urgent = await plane.submit("urgent", priority=90)
    await plane.report(running, 1)
    await plane.finish(running, 1)
    assert await started(plane, reconciler, [urgent]) == [urgent]


async def test_rest__is_told_why_it_waits_at_the_next_look_at_all(plane: ControlPlane) -> None:
    for n in range(5):
        await plane.submit(f"job-{n}")
    reconciler = plane.reconciler()
    await reconciler.run_once()
    last = await plane.submit("last")
    await reconciler.run_once()
    assert (await plane.job(last)).reason != BEHIND
    plane.advance(module._WHOLE_QUEUE_EVERY_S)
    await reconciler.run_once()
    assert (await plane.job(last)).reason == BEHIND


async def test_rest__is_not_kept_waiting_by_a_head_that_cannot_start(plane: ControlPlane) -> None:
    needed = await plane.submit("tokenizer", priority=0)
    reconciler = plane.reconciler()
    await reconciler.run_once()
    for n in range(3):
        await plane.submit(f"waits-{n}", priority=90, inputs_wait=[needed])
    other = await plane.submit("other", priority=10)
    plane.launcher.total = FakeLauncher(cpus=2).total
    assert await started(plane, reconciler, [other]) == []
    plane.advance(module._WHOLE_QUEUE_EVERY_S)
    assert await started(plane, reconciler, [other]) == [other]


async def test_head__jobs_that_no_cluster_could_hold_keep_nobody_waiting(plane: ControlPlane) -> None:
    most = {"workers": 1024, "gpus_per_worker": 1, "cpus_per_worker": 256}
    impossible = [
        await plane.submit(f"impossible-{n}", priority=100, resolved={"resources": most}) for n in range(10)
    ]
    healthy = await plane.submit("healthy", priority=0)
    reconciler = plane.reconciler()
    assert await started(plane, reconciler, [healthy, *impossible]) == [healthy]
    assert (await plane.job(impossible[0])).reason == (
        "waiting: the cluster is too small, it needs 262144 CPUs and there are 1 and it needs 1024 GPUs and "
        "there are 0"
    )
    await plane.report(healthy, 1)
    await plane.finish(healthy, 1)
    other = await plane.submit("other", priority=0)
    # The head holds three; the others are looked at with the whole queue.
    plane.advance(module._WHOLE_QUEUE_EVERY_S)
    assert await started(plane, reconciler, [other]) == [other]


async def test_whole_queue__the_longer_a_look_takes_the_rarer_it_is(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int | None] = []
    inner = observe.open_jobs

    async def slow(*args: Any, most_queued: int | None, **kwargs: Any) -> Observation:
        looks.append(most_queued)
        plane.advance(0 if most_queued else 10)
        return await inner(*args, most_queued=most_queued, **kwargs)

    monkeypatch.setattr(observe, "open_jobs", slow)
    reconciler = plane.reconciler()
    for _ in range(9):
        await reconciler.run_once()
        plane.advance(8)
    assert looks == [None, 3, 3, 3, 3, None, 3, 3, 3]
