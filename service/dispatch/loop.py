"""The dispatcher's life: passes over the jobs and deliveries to the tracker, until told to stop."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from service.contracts.addresses import redacted
from service.db.engine import Sessions
from service.db.failures import DatabaseFailure, is_outage, kind_of
from service.db.leases import COLLECT, FORWARD, RECONCILE, Lease, LeaseLostError
from service.dispatch.forwarder import Forwarder
from service.dispatch.garbage import Collector
from service.dispatch.leadership import Leadership, Pulse, Work, first_line, pause, replica_name
from service.dispatch.ray_launcher import RayLauncher
from service.dispatch.reconciler import Reconciler, Rules
from service.dispatch.tracker import Tracker
from service.domain.decide import Limits
from service.settings import Settings
from service.store.base import ObjectStore

logger = logging.getLogger(__name__)

_MAX_PAUSE_S = 30.0
OpenTracker = Callable[[Settings], Tracker]


async def dispatch(
    settings: Settings,
    sessions: Sessions,
    store: ObjectStore,
    *,
    open_tracker: OpenTracker,
    stop: asyncio.Event,
) -> None:
    """Reconcile and forward until `stop` is set. Of several dispatchers, one does each at a time.

    `open_tracker` runs in a thread, because loading MLflow takes seconds.
    """
    token = settings.ray_token.get_secret_value() if settings.ray_token else None
    launcher = RayLauncher(settings.ray_url, token=token)
    leadership = Leadership(sessions, owner=replica_name(), lease_s=settings.lease_s, stop=stop)

    async def reconcile(lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        # A new one for each lease: what an earlier one saw of the cluster is old.
        reconciler = Reconciler(
            sessions, launcher, store, lease=lease, rules=rules(settings), on_doing=pulse.tell
        )
        await repeat(reconciler.run_once, every_s=settings.reconcile_every_s, pulse=pulse, stop=over)

    async def forward() -> None:
        tracker = await asyncio.to_thread(open_tracker, settings)
        await leadership.lead(FORWARD, _forwarding(settings, sessions, store, tracker, stop=stop))

    async def collect(lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        # Passes may overlap, so the lease only spares work.
        collector = Collector(sessions, store, lease=lease, after_s=settings.garbage_after_s)
        await repeat(collector.run_once, every_s=settings.garbage_every_s, pulse=pulse, stop=over)

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leadership.lead(RECONCILE, reconcile))
            tasks.create_task(leadership.lead(COLLECT, collect))
            if settings.mlflow_url is not None:
                tasks.create_task(forward())
    finally:
        await launcher.close()


def rules(settings: Settings) -> Rules:
    """The part of the settings that the reconciler obeys."""
    return Rules(
        limits=Limits(
            start_deadline_s=settings.start_deadline_s,
            stall_after_s=settings.stall_after_s,
            stop_grace_s=settings.stop_grace_s,
            lost_grace_s=settings.lost_grace_s,
        ),
        backoff=settings.backoff,
        max_active=settings.max_active_jobs,
        worker_command=(settings.worker_python, "-m", "workers"),
        public_url=settings.public_url,
        secret=settings.secret.get_secret_value(),
    )


async def repeat(
    work: Callable[[], Awaitable[None]], *, every_s: float, pulse: Pulse, stop: asyncio.Event
) -> None:
    """Do `work` again and again until `stop` is set; a failure is logged and costs a growing pause.

    Raises LeaseLostError as soon as `work` does. Each end of it is told to `pulse`.
    """
    failures = _Failures()
    while not stop.is_set():
        try:
            await work()
            failures.over()
            pulse.ended()
        except LeaseLostError:
            raise
        except Exception as error:
            # Whatever it was, the next pass starts from what is there.
            failures.tell(error)
            pulse.failed(failure_text(error))
        pause_s = min(every_s * 2 ** min(failures.num_in_a_row, 10), max(every_s, _MAX_PAUSE_S))
        # Several dispatchers shall not knock at the same moment.
        await pause(stop, timeout_s=pause_s * random.uniform(0.9, 1.1))


class _Failures:
    """Failed passes in a row. An outage of the database is told once, anything else each time and in full."""

    def __init__(self) -> None:
        self.num_in_a_row = 0
        self._away = False

    def tell(self, error: Exception) -> None:
        self.num_in_a_row += 1
        if not is_outage(error):
            logger.error("a pass failed, %d in a row", self.num_in_a_row, exc_info=error)
        elif not self._away:
            logger.warning("%s", failure_text(error))
            self._away = True

    def over(self) -> None:
        if self._away:
            logger.info("the database answers again")
        self.num_in_a_row, self._away = 0, False


def failure_text(error: Exception) -> str:
    """Why a pass failed, for the log and for whoever asks why nothing goes on."""
    told = redacted(first_line(error))
    match kind_of(error):
        case DatabaseFailure.CONNECTION:
            return f"the database does not answer: {told}"
        case DatabaseFailure.CONTENTION:
            return f"the database is too busy: {told}"
        case _:
            return f"a pass failed: {type(error).__name__}: {told}"


def _forwarding(
    settings: Settings, sessions: Sessions, store: ObjectStore, tracker: Tracker, *, stop: asyncio.Event
) -> Work:
    async def forward(lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        forwarder = Forwarder(sessions, tracker, store, lease=lease, public_url=settings.public_url)
        await repeat(forwarder.run_once, every_s=settings.forward_every_s, pulse=pulse, stop=over)
        if stop.is_set():
            # What ended in the last second is still worth a try, but no trouble at the end.
            try:
                await forwarder.run_once()
            except Exception as error:
                if not is_outage(error):
                    raise

    return forward
