"""The dispatcher's passes over what may go: job by job, one line in the log for each that lost something."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from service.db.engine import OUTAGES, Sessions
from service.jobs import garbage
from service.jobs.garbage import Pass, Removed
from service.store.base import ObjectStore, StoreError

logger = logging.getLogger(__name__)


class Collector:
    """Removes what nothing names any more, `after_s` seconds after its attempt was over."""

    def __init__(
        self,
        sessions: Sessions,
        store: ObjectStore,
        *,
        after_s: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._sessions, self._store = sessions, store
        self._after, self._clock = timedelta(seconds=after_s), clock
        self._complained = ""

    async def run_once(self) -> None:
        """Look through every job that may have left something, and through what jobs share."""
        now = self._clock()
        look = Pass(now=now, before=now - self._after, deletes=True)
        try:
            async for job_id in garbage.jobs(self._sessions):
                await self._sweep(job_id, look)
            _tell(await garbage.sweep_shared(self._store, look=look))
        except StoreError as error:
            # It is down for the other jobs too, and the next pass finds what this one leaves.
            if str(error) != self._complained:
                logger.warning("garbage waits: %s", error)
            self._complained = str(error)
        else:
            self._complained = ""

    async def _sweep(self, job_id: str, look: Pass) -> None:
        try:
            _tell(await garbage.sweep_job(self._sessions, self._store, job_id, look=look))
        except (StoreError, *OUTAGES):
            raise
        except Exception:
            # One job's trouble is not another's.
            logger.exception("job %s could not be looked through for garbage", job_id)


def _tell(removed: Removed) -> None:
    if removed:
        logger.info("%s: removed %s", removed.place, garbage.removed_text(removed))
