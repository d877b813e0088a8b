"""Killed workers, a killed service, a cancelled job: nothing is lost and nothing is doubled."""

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from service.contracts.jobs import JobView
from tests.acceptance.embedded import Embedded, specs

CANCEL_WITHIN_S = 30


@pytest.fixture(autouse=True)
def nothing_left_running(embedded: Embedded) -> Iterator[None]:
    """A test that fails does not leave its job to starve the next one."""
    yield
    for job in list(embedded.client.jobs(state="running")):
        embedded.client.cancel(job.id)


def _long_job(embedded: Embedded, tokenizer: str, name: str, *, steps: int) -> JobView:
    """A running job that has committed its checkpoint of step 10."""
    spec = specs.pretrain(name, f"job:{tokenizer}", enhancer=specs.VIT, objective="revdet", steps=steps)
    (job,) = embedded.client.submit([{**spec, "resources": {"workers": 2, "cpus_per_worker": 1}}])
    # Checkpoints are uploaded beside the training: the step counter runs ahead of what is committed.
    return embedded.until(job.id, lambda view: view.state == "running" and _has_checkpoint(embedded, view))


def _has_checkpoint(embedded: Embedded, job: JobView) -> bool:
    return any("checkpoints/step-10/" in entry.path for entry in embedded.client.artifacts(job.id))


def _train_workers(embedded: Embedded) -> list[psutil.Process]:
    """The Ray Train worker processes of the service."""
    return [process for process in embedded.descendants() if "RayTrainWorker" in _command(process)]


def _command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _assert_every_step_once(embedded: Embedded, job: JobView) -> None:
    steps = [point.step for point in embedded.client.metrics(job.id, key="mim_loss")]
    assert steps == sorted(set(steps))
    assert job.progress.total_steps is not None
    assert steps == [1, *range(5, job.progress.total_steps + 1, 5)]


@pytest.mark.slow
def test_sigkilled_worker__is_retried_from_the_last_committed_checkpoint(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "worker-killed", steps=100)
    workers = _train_workers(embedded)
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    job = embedded.finished(job.id)

    assert job.state == "succeeded", job.reason
    first, second = job.attempts
    assert first.failure_kind == "infrastructure"
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= 10
    assert second.resumed_from_step % 10 == 0
    _assert_every_step_once(embedded, job)


@pytest.mark.slow
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


@pytest.mark.slow
def test_cancel__ends_a_running_job_within_30_seconds_and_keeps_its_checkpoint(
    embedded: Embedded, tokenizer_name: str
) -> None:
    job = _long_job(embedded, tokenizer_name, "cancelled", steps=100_000)
    assert _train_workers(embedded)
    asked = time.monotonic()
    embedded.client.cancel(job.id)
    job = embedded.finished(job.id)

    assert job.state == "cancelled"
    assert time.monotonic() - asked < CANCEL_WITHIN_S  # the issue's own bound, not a benchmark
    deadline = time.monotonic() + CANCEL_WITHIN_S
    while _train_workers(embedded):
        assert time.monotonic() < deadline, "workers of a cancelled job live on"
        time.sleep(0.5)
