"""What goes wrong for one job, so that it ends that job's turn and not the pass.

It is told in the log once, and after a few times in a row in the job's reason and events, because its user
sees no log. Meanwhile its turns become rare: a job that fails each time shall not cost the others each time.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from service.contracts.addresses import redacted
from service.contracts.printable import printable
from service.db.failures import DatabaseFailure, is_outage, kind_of
from service.db.leases import GuardedSessions, LeaseLostError
from service.dispatch import record
from service.dispatch.launcher import LauncherUnavailableError
from service.dispatch.tracker import TrackerFailedError, TrackerUnavailableError
from service.store.base import StoreError

logger = logging.getLogger(__name__)

TOLD_AFTER = 3  # failed turns in a row
RESTS_S = (1.0, 60.0)  # once it is told, and, doubled each time, at most
# Something outside failed, and has been told why: no traceback says more.
_FORESEEN = (LauncherUnavailableError, TrackerUnavailableError, TrackerFailedError, StoreError)
_MOST_CONTENDED = 2  # turns of one pass that may wait in vain for a lock
_LONGEST = 500  # characters of an error


@dataclass(kw_only=True)
class _Trouble:
    """Failed turns of one job in a row."""

    number: int = 0
    rests_until: float = 0.0
    error: str = ""  # what was logged last
    told: str = ""  # what was written into the job's reason
    before: str = ""  # what stood there


class Troubles:
    """The jobs of one kind of pass. Each pass is between `begin` and `end`; a job's turn is in `turn`."""

    def __init__(
        self,
        guarded: GuardedSessions,
        *,
        what: str,
        rests_s: tuple[float, float] = RESTS_S,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` is the beginning of the sentence that the user reads, e.g. "it cannot be forwarded"."""
        self._guarded, self._what, self._clock, self._monotonic = guarded, what, clock, monotonic
        self._first_rest_s, self._longest_rest_s = rests_s
        self._of: dict[str, _Trouble] = {}
        self._went: set[str] = set()  # of this pass
        self._failed: set[str] = set()
        self._contended = 0

    @property
    def resting(self) -> frozenset[str]:
        """Jobs that failed a moment ago, whose next turn is not due."""
        now = self._monotonic()
        return frozenset(job_id for job_id, one in self._of.items() if one.rests_until > now)

    def begin(self) -> None:
        """Begin a pass."""
        self._went.clear()
        self._failed.clear()
        self._contended = 0

    async def end(self) -> None:
        """End a pass: jobs all of whose turns went well in it are rid of their troubles."""
        for job_id in self._went - self._failed:
            if (over := self._of.pop(job_id, None)) is not None and over.told:
                logger.info("job %s goes on", job_id)
                await record.untell(self._guarded, job_id, over.told, before=over.before)

    @asynccontextmanager
    async def turn(self, job_id: str) -> AsyncIterator[None]:
        """One job's turn, or a part of it: an error inside is noted and goes no further.

        But for a lost lease and an outage of the database, which end the pass.
        """
        try:
            yield
        except LeaseLostError:
            raise
        except Exception as error:
            self._check_outage(error)
            await self.note(job_id, error)
        else:
            self._went.add(job_id)

    async def note(self, job_id: str, error: Exception) -> bool:
        """Count an error of a job's turn, and tell whom it concerns; whether it is no chance any more.

        Raises LeaseLostError and outages of the database; what else goes wrong here is only logged.
        """
        self._failed.add(job_id)
        trouble = self._of.setdefault(job_id, _Trouble())
        trouble.number += 1
        text = _text(error)
        if text != trouble.error:
            trouble.error = text
            level, trace = (logging.WARNING, None) if isinstance(error, _FORESEEN) else (logging.ERROR, error)
            logger.log(level, "job %s: %s: %s", job_id, self._what, text, exc_info=trace)
        if trouble.number < TOLD_AFTER:
            return False  # what was chance is over by the next pass
        rest_s = self._first_rest_s * 2.0 ** min(trouble.number - TOLD_AFTER, 30)
        trouble.rests_until = self._monotonic() + min(rest_s, self._longest_rest_s)
        if not trouble.told:
            sentence = f"{self._what} ({trouble.number} tries failed, others follow): {text}"
            try:
                now = self._clock()
                trouble.before = await record.tell(self._guarded, job_id, sentence, now=now)
                trouble.told = sentence
            except LeaseLostError:
                raise
            except Exception as untold:
                self._check_outage(untold)
                logger.warning("job %s: its reason could not be written: %s", job_id, _text(untold))
        return True

    def _check_outage(self, error: Exception) -> None:
        """Raise `error` where it concerns every job, as a lock on one job's row does not."""
        if kind_of(error) is DatabaseFailure.CONTENTION:
            self._contended += 1
            if self._contended <= _MOST_CONTENDED:
                return
        if is_outage(error):
            raise error


def _text(error: Exception) -> str:
    """The first line of an error, fit for every database, without secrets."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return redacted(printable(text[:_LONGEST]))
