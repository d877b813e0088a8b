"""One attempt from the outside: what to do, which images, start the ranks, say how it ended."""

import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cim_core.config import DALL_E
from service.client.errors import ApiError, BrokenManifestError, StaleAttempt
from service.client.work import WorkClient
from service.contracts.jobs import FailureKind, Progress
from service.contracts.specs import PretrainSpec
from service.contracts.work import Assignment, Finish
from workers.attempt import Attempt, Outcome, Work
from workers.cache import discard
from workers.data import prepare
from workers.failures import EXIT_CODES, AttemptStaleError, ExitCode, SpecError, classify, is_stale, last_step
from workers.logs import LogShipper, attach, detach, send_left_lines
from workers.official import OfficialTokenizer
from workers.reporting import Reporter, insistently
from workers.settings import UsageError, WorkerSettings, apply_train_environment, secrets_of
from workers.storage import JobStore, ray_storage
from workers.train_loop import train_loop

log = logging.getLogger(__name__)

LAST_REPORT_S = 10.0
STARTS_OF_A_GROUP = 5  # placement is tried again that often, each for the start timeout of settings.py


class StopAskedError(Exception):
    """The service asked for an end before training began."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What the driver works with."""

    attempt: Attempt
    store: JobStore
    service: WorkClient
    reporter: Reporter
    shipper: LogShipper

    def go_on(self) -> None:
        """Raise when the attempt must end: `StopAskedError`, `AttemptStaleError`, `ServiceAwayError`."""
        self.reporter.check()
        if self.reporter.stop_requested:
            raise StopAskedError


def run(settings: WorkerSettings) -> ExitCode:
    """Do one attempt and tell the service how it ended, unless a newer attempt owns the job."""
    apply_train_environment()
    service = WorkClient(settings.url, settings.job_id, settings.attempt, settings.token)
    try:
        service.claim(settings.code)
        assignment = service.assignment()
        finish = _attempt(settings, assignment, service)
        if finish is None:
            return ExitCode.STALE
        finish = _told(service, finish, store_url=assignment.store.url)
    except StaleAttempt:
        log.warning("a newer attempt owns this job, or it is final: nothing more is written")
        return ExitCode.STALE
    except ApiError:
        log.exception("the service refused, or stayed away: how the attempt ended is not told")
        return ExitCode.INFRASTRUCTURE
    finally:
        service.close()
    return ExitCode.DONE if finish.failure is None else EXIT_CODES[finish.failure.kind]


def _attempt(settings: WorkerSettings, assignment: Assignment, service: WorkClient) -> Finish | None:
    """Do it all; how it ended, or None when the attempt may not say so."""
    try:
        attempt = Attempt.of(settings, assignment)
    except SpecError as error:
        log.exception("the assignment cannot be used")
        return Finish(outcome="failed", step=0, failure=classify(error, store_url=assignment.store.url))
    with _desk(attempt, service) as desk:
        finish = _finish_of(desk)
    if finish is not None and _is_last(finish):
        _send_left_lines(attempt, desk.store, patient=True)
        discard(attempt.cache)
    return finish


def _told(service: WorkClient, finish: Finish, *, store_url: str) -> Finish:
    """Tell how it ended, and return that: a success whose files the service does not find is none."""
    try:
        insistently(lambda: service.finish(finish))
    except BrokenManifestError as error:
        log.exception("the service does not find what this attempt stored")
        failure = classify(error, store_url=store_url)
        failed = Finish(outcome="failed", step=finish.step, failure=failure)
        insistently(lambda: service.finish(failed))
        return failed
    return finish


def _is_last(finish: Finish) -> bool:
    """Whether no attempt will follow."""
    failed = finish.failure is not None and finish.failure.kind is FailureKind.USER
    return failed or finish.outcome == "succeeded"


@contextmanager
def _desk(attempt: Attempt, service: WorkClient) -> Iterator[Desk]:
    store = JobStore.of(attempt.assignment)
    shipper = LogShipper(
        store.store,
        store.log_prefix,
        spool=attempt.spool,
        attempt=store.attempt,
        source="driver",
        secrets=secrets_of(attempt.settings),
    )
    reporter = Reporter(service, every_s=attempt.assignment.report_every_s)
    attach(shipper)
    shipper.start()
    reporter.start()
    try:
        _send_left_lines(attempt, store)
        yield Desk(attempt=attempt, store=store, service=service, reporter=reporter, shipper=shipper)
    finally:
        # Logs end before the final state is written: whoever sees the state may read them all.
        reporter.close()
        detach(shipper)
        if not shipper.abandoned:
            _send_left_lines(attempt, store)


def _send_left_lines(attempt: Attempt, store: JobStore, *, patient: bool = False) -> bool:
    return send_left_lines(attempt.spool.parent, store.store, store.logs_prefix, patient=patient)


def _finish_of(desk: Desk) -> Finish | None:
    """How the attempt ended; None when it may not say so."""
    try:
        outcome = _do(desk)
    except StopAskedError:
        outcome = Outcome(stopped=True, step=desk.attempt.resume_step)
    except Exception as error:
        if is_stale(error):
            desk.shipper.abandon()
            return None
        log.exception("the attempt failed")
        _deliver_the_rest(desk)
        secrets = secrets_of(desk.attempt.settings)
        failure = classify(error, store_url=desk.store.url, secrets=secrets)
        step = last_step(error, default=desk.attempt.resume_step)
        return Finish(outcome="failed", step=step, failure=failure)
    log.info("%s at step %d", "stopped" if outcome.stopped else "succeeded", outcome.step)
    return Finish(
        outcome="stopped" if outcome.stopped else "succeeded",
        step=outcome.step,
        total_steps=outcome.total_steps,
        metrics=outcome.metrics,
        files=outcome.files,
        warnings=outcome.warnings,
    )


def _deliver_the_rest(desk: Desk) -> None:
    """Files that explain the failure may still wait to be announced; else rank 0 has had the last word."""
    with suppress(AttemptStaleError):
        if desk.reporter.waiting:
            desk.reporter.flush(timeout_s=LAST_REPORT_S)


def _do(desk: Desk) -> Outcome:
    work = prepare(desk.attempt, desk.store, reporter=desk.reporter, go_on=desk.go_on)
    desk.go_on()
    work = dataclasses.replace(work, tokenizer=_official_tokenizer(desk))
    desk.go_on()
    connect(desk.attempt.settings)
    workers = desk.attempt.spec.resources.workers
    total = work.plan.total_steps if work.plan else None
    step = desk.attempt.resume_step
    desk.reporter.progress(
        Progress(step=step, total_steps=total, message=f"starting {workers} worker{'s' * (workers > 1)}")
    )
    desk.reporter.flush()
    # From here on rank 0 reports.
    desk.reporter.close()
    return _train(work, desk.store)


def _official_tokenizer(desk: Desk) -> str | None:
    """Where the ranks find OpenAI's tokenizer, if the spec wants that one. Fetched here, once for all."""
    spec, store = desk.attempt.spec, desk.attempt.assignment.store
    source = spec.model.tokenizer if isinstance(spec, PretrainSpec) else None
    if source is None or source.source != DALL_E:
        return None
    official = OfficialTokenizer(
        source=source,
        store=desk.store.store,
        address=store,
        allowed=desk.attempt.allowed,
        folder=desk.attempt.cache,
        say=desk.reporter.say,
        go_on=desk.go_on,
    )
    return official.place()


def connect(settings: WorkerSettings) -> None:
    """Join the running cluster of this job, never start one.

    Raises:
        UsageError: nobody said which cluster.
    """
    if ray.is_initialized():
        return
    if settings.ray_address is None:
        raise UsageError("RAY_ADDRESS is not set: start the worker as a Ray job, or name the cluster there")
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=settings.ray_address)
    # Ray puts a handler of its own there, with another exit status.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _train(work: Work, store: JobStore) -> Outcome:
    attempt = work.attempt
    needs = attempt.spec.resources
    resources = {"CPU": float(needs.cpus_per_worker)}
    if needs.gpus_per_worker:
        resources["GPU"] = float(needs.gpus_per_worker)
    path, filesystem = ray_storage(
        attempt.assignment.store, prefix=f"{store.prefix}/{store.attempt_prefix}/ray"
    )
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            num_workers=needs.workers, use_gpu=needs.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=attempt.run_name,
            storage_path=path,
            storage_filesystem=filesystem,
            # Retrying is the service's part: it raises the fence before a new attempt writes.
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=STARTS_OF_A_GROUP
            ),
        ),
    )
    outcome = trainer.fit().return_value
    assert isinstance(outcome, Outcome), f"rank 0 must return an Outcome, got {type(outcome).__name__}"
    return outcome
