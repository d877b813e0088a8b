"""What a rank works with, made at the start of the training function and closed at its end."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray.train
import ray.train.torch
import torch

from service.client.work import WorkClient
from service.contracts.jobs import FileEntry, Progress
from workers.attempt import Attempt, Work, plan_document
from workers.failures import is_stale, portable
from workers.logs import LogShipper, attach, detach
from workers.reporting import Reporter
from workers.settings import secrets_of
from workers.storage import JobStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of the processes that train together. Only rank 0 talks to the service."""

    work: Work
    number: int
    world_size: int
    device: torch.device
    store: JobStore
    service: WorkClient
    reporter: Reporter
    files: list[FileEntry]  # stored by this attempt so far, the driver's included

    @property
    def attempt(self) -> Attempt:
        """The attempt that this rank is part of."""
        return self.work.attempt

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.number == 0

    def announce(self, entry: FileEntry) -> None:
        """Note a stored file for the result and tell the service at once."""
        self.files.append(entry)
        self.reporter.file(entry)

    def say(self, message: str) -> None:
        """Show what happens now."""
        self.reporter.say(message)


@contextmanager
def rank_of(work: Work) -> Iterator[Rank]:
    """This process as a rank. Whatever is raised inside leaves as an exception that can travel.

    Raises:
        AttemptFailedError: with the kind and the sentence for the user; the traceback is in the log.
        AttemptStaleError: a newer attempt owns the job.
    """
    context = ray.train.get_context()
    attempt, number = work.attempt, context.get_world_rank()
    settings = attempt.settings
    store = JobStore.of(attempt.assignment)
    shipper = LogShipper(
        store.store,
        store.log_prefix,
        spool=attempt.spool,
        attempt=store.attempt,
        source=f"rank-{number}",
        secrets=secrets_of(settings),
    )
    service = WorkClient(settings.url, settings.job_id, settings.attempt, settings.token)
    reporter = Reporter(service, every_s=attempt.assignment.report_every_s)
    rank = Rank(
        work=work,
        number=number,
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        store=store,
        service=service,
        reporter=reporter,
        files=list(work.files),
    )
    attach(shipper)
    shipper.start()
    if rank.leads:
        _begin_reports(rank)
    torch.set_num_threads(attempt.spec.resources.cpus_per_worker)
    try:
        yield rank
    except BaseException as error:
        if is_stale(error):
            shipper.abandon()
        else:
            log.exception("rank %d failed", number)
        secrets = secrets_of(settings)
        raise portable(error, store_url=store.url, step=reporter.step, secrets=secrets) from None
    finally:
        reporter.close()
        detach(shipper)
        service.close()


def _begin_reports(rank: Rank) -> None:
    plan, step = rank.work.plan, rank.attempt.resume_step
    rank.reporter.progress(
        Progress(step=step, total_steps=plan.total_steps if plan else None, message="building the model")
    )
    if plan is not None:  # again: the driver may have waited in vain for the service to take it
        rank.reporter.plan(plan_document(plan))
    rank.reporter.start()
    log.info("%d ranks on %s, process %d", rank.world_size, rank.device, os.getpid())
