"""The dispatcher's passes over what may go: job by job, one line in the log for each that lost something."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from service.db.engine import Sessions
from service.db.leases import GuardedSessions, Lease
from service.dispatch.troubles import Troubles
from service.jobs import garbage
from service.jobs.garbage import Pass, Removed
from service.store.base import ObjectStore, StoreError

logger = logging.getLogger(__name__)

_MOST_REFUSED = 3  # jobs of one pass with which the store does not help; then it is probably away
_RESTS_S = (120.0, 3600.0)  # a pass is a minute


class Collector:
    """Removes what nothing names any more, `after_s` seconds after its attempt was over."""

    def __init__(
        self,
        sessions: Sessions,
        store: ObjectStore,
        *,
        lease: Lease,
        after_s: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions, self._store = sessions, store
        self._after, self._clock = timedelta(seconds=after_s), clock
        self._troubles = Troubles(
            GuardedSessions(sessions=sessions, lease=lease),
            what="what it left behind cannot be removed",
            rests_s=_RESTS_S,
            clock=clock,
            monotonic=monotonic,
        )
        self._complained = ""

    async def run_once(self) -> None:
        """Look through every job that may have left something, and through what jobs share.

        What goes wrong for one job is that job's trouble alone. Raises LeaseLostError once another
        dispatcher may be at it, and what the database raises when it is away.
        """
        now = self._clock()
        look = Pass(now=now, before=now - self._after, deletes=True)
        try:
            # First what no job owns: where the store is away, it says so here.
            _tell(await garbage.sweep_shared(self._store, look=look))
        except StoreError as error:
            # The next pass finds what this one leaves.
            if str(error) != self._complained:
                logger.warning("garbage waits: %s", error)
            self._complained = str(error)
            return
        self._complained = ""
        self._troubles.begin()
        await self._sweep_jobs(look)
        await self._troubles.end()

    async def _sweep_jobs(self, look: Pass) -> None:
        resting, num_refused = self._troubles.resting, 0
        async for job_id in garbage.jobs(self._sessions):
            if job_id in resting:
                continue
            async with self._troubles.turn(job_id):
                try:
                    _tell(await garbage.sweep_job(self._sessions, self._store, job_id, look=look))
                except StoreError:
                    num_refused += 1
                    raise
            if num_refused == _MOST_REFUSED:
                return


def _tell(removed: Removed) -> None:
    if removed:
        logger.info("%s: removed %s", removed.place, garbage.removed_text(removed))
