"""The dispatcher's life: passes over the jobs and deliveries to the tracker, until told to stop."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from service.db.engine import Sessions
from service.dispatch.forwarder import Forwarder
from service.dispatch.garbage import Collector
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
    """Reconcile and forward until `stop` is set. Several dispatchers on one database are safe.

    `open_tracker` runs in a thread, because loading MLflow takes seconds.
    """
    token = settings.ray_token.get_secret_value() if settings.ray_token else None
    launcher = RayLauncher(settings.ray_url, token=token)
    reconciler = Reconciler(sessions, launcher, store, rules=rules(settings))
    collector = Collector(sessions, store, after_s=settings.garbage_after_s)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(repeat(reconciler.run_once, every_s=settings.reconcile_every_s, stop=stop))
            tasks.create_task(repeat(collector.run_once, every_s=settings.garbage_every_s, stop=stop))
            if settings.mlflow_url is not None:
                tasks.create_task(_forward(settings, sessions, store, open_tracker=open_tracker, stop=stop))
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


async def repeat(work: Callable[[], Awaitable[None]], *, every_s: float, stop: asyncio.Event) -> None:
    """Do `work` again and again until `stop` is set; a failure is logged and costs a growing pause."""
    num_failures = 0
    while not stop.is_set():
        try:
            await work()
            num_failures = 0
        except Exception:
            # The database may be away; whatever it was, the next pass starts from what is there.
            num_failures += 1
            logger.exception("a pass failed, %d in a row", num_failures)
        pause_s = min(every_s * 2 ** min(num_failures, 10), max(every_s, _MAX_PAUSE_S))
        # Several dispatchers shall not knock at the same moment.
        await _wait(stop, timeout_s=pause_s * random.uniform(0.9, 1.1))


async def _forward(
    settings: Settings,
    sessions: Sessions,
    store: ObjectStore,
    *,
    open_tracker: OpenTracker,
    stop: asyncio.Event,
) -> None:
    tracker = await asyncio.to_thread(open_tracker, settings)
    forwarder = Forwarder(sessions, tracker, store, public_url=settings.public_url)
    await repeat(forwarder.run_once, every_s=settings.forward_every_s, stop=stop)
    # What ended in the last second is still worth a try.
    await forwarder.run_once()


async def _wait(stop: asyncio.Event, *, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await stop.wait()
    except TimeoutError:
        return
