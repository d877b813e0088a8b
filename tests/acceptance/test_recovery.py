"""Killed workers, drivers, heads and services, a cancelled job: nothing is lost, doubled or left behind."""

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from service.contracts.jobs import FINAL, JobView
from tests.acceptance.embedded import Embedded, specs

# The first test starts the service and trains a tokenizer before it begins.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CANCEL_WITHIN_S = 30
CLEAN_WITHIN_S = 60


@pytest.fixture(autouse=True)
def nothing_left_running(embedded: Embedded) -> Iterator[None]:
    """A test that fails does not leave its job to starve the next one."""
    yield
    for job in list(embedded.client.jobs(state="running")):
        embedded.client.cancel(job.id)


def _long_job(embedded: Embedded, tokenizer: str, name: str, *, steps: int, workers: int = 2) -> JobView:
    """A running job that has committed its checkpoint of step 10."""
    spec = specs.pretrain(name, f"job:{tokenizer}", enhancer=specs.VIT, objective="revdet", steps=steps)
    (job,) = embedded.client.submit([{**spec, "resources": {"workers": workers, "cpus_per_worker": 1}}])
    # Checkpoints are uploaded beside the training: the step counter runs ahead of what is committed.
    return embedded.until(job.id, lambda view: view.state == "running" and _has_checkpoint(embedded, view))


def _has_checkpoint(embedded: Embedded, job: JobView) -> bool:
    return any("checkpoints/step-10/" in entry.path for entry in embedded.client.artifacts(job.id))


def _train_workers(embedded: Embedded) -> list[psutil.Process]:
    """The Ray Train worker processes of the service."""
    return [process for process in embedded.descendants() if "RayTrainWorker" in _command(process)]


def _driver(embedded: Embedded, job: JobView) -> psutil.Process:
    """The process that Ray started for the job's latest attempt, not the shell around it."""
    wanted = ["-m", "workers", f"{job.id}/{len(job.attempts)}"]
    found = [p for p in embedded.descendants() if set(wanted) <= set(_arguments(p))]
    assert len(found) == 1, [_command(p) for p in embedded.descendants()]
    return found[0]


def _head(embedded: Embedded) -> psutil.Process:
    (found,) = [p for p in embedded.descendants() if _arguments(p)[:1] and "gcs_server" in _arguments(p)[0]]
    return found


def _arguments(process: psutil.Process) -> list[str]:
    """Its command line; empty where it has ended since it was listed."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _command(process: psutil.Process) -> str:
    return " ".join(_arguments(process))


def _assert_every_step_once(embedded: Embedded, job: JobView) -> None:
    steps = [point.step for point in embedded.client.metrics(job.id, key="mim_loss")]
    assert steps == sorted(set(steps))
    assert job.progress.total_steps is not None
    assert steps == [1, *range(5, job.progress.total_steps + 1, 5)]


def _assert_nothing_is_left(embedded: Embedded) -> None:
    """No job runs: so no process trains, and Ray keeps no actor and no placement group."""
    deadline = time.monotonic() + CLEAN_WITHIN_S
    while left := [*map(_command, _train_workers(embedded)), *embedded.alive_in_ray()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.5)


def _assert_one_retry(embedded: Embedded, job: JobView) -> None:
    assert job.state == "succeeded", job.reason
    first, second = job.attempts
    assert first.failure_kind == "infrastructure"
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= 10
    assert second.resumed_from_step % 10 == 0
    assert [event.dst for event in embedded.client.events(job.id) if event.dst in FINAL] == ["succeeded"]
    _assert_every_step_once(embedded, job)
    _assert_nothing_is_left(embedded)


def test_sigkilled_worker__is_retried_from_the_last_committed_checkpoint(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "worker-killed", steps=100)
    workers = _train_workers(embedded)
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    job = embedded.finished(job.id)

    _assert_one_retry(embedded, job)


def test_sigkilled_driver__is_retried_from_the_last_committed_checkpoint(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "driver-killed", steps=100, workers=1)
    _driver(embedded, job).kill()
    _assert_one_retry(embedded, embedded.finished(job.id))


def test_sigkilled_head__is_started_again_and_its_job_retried(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "head-killed", steps=100, workers=1)
    family = embedded.descendants("Ray")
    _head(embedded).kill()
    _assert_one_retry(embedded, embedded.finished(job.id))
    _, left = psutil.wait_procs(family, timeout=CLEAN_WITHIN_S)
    assert not left, f"the old head has left {left}"


def test_sigkilled_service__comes_back_and_finishes_the_running_job(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "service-killed", steps=200)
    embedded.kill()
    time.sleep(3)  # the workers meet a service that refuses connections
    embedded.start()
    job = embedded.finished(job.id)

    assert job.state == "succeeded", job.reason
    assert len(job.attempts) == 1
    _assert_every_step_once(embedded, job)
    _assert_nothing_is_left(embedded)


def test_cancel__ends_a_running_job_within_30_seconds_and_keeps_its_checkpoint(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "cancelled", steps=100_000)
    assert _train_workers(embedded)
    assert {line.split(":")[0] for line in embedded.alive_in_ray()} == {"actors", "placement_groups"}
    asked = time.monotonic()
    embedded.client.cancel(job.id)
    job = embedded.finished(job.id)

    assert job.state == "cancelled"
    assert time.monotonic() - asked < CANCEL_WITHIN_S  # the issue's own bound, not a benchmark
    _assert_nothing_is_left(embedded)
