"""One pass over all open jobs (of a long queue mostly its head): observe, decide, act, record.

Level-triggered: a pass looks at how things are, never at what happened. Whatever it does outside
the database may be done twice, so killing it anywhere and starting again is normal.

All writes are guarded by a lease. A pass that was asleep while another dispatcher took the lease is
over at its first write, and what it asks of the cluster follows a write: see docs/decisions/leases.md.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import assert_never

from service.contracts.addresses import redacted
from service.contracts.jobs import JobState, LogLine
from service.contracts.printable import printable
from service.contracts.tokens import claim_code
from service.db import moves
from service.db.engine import Sessions
from service.db.failures import is_outage
from service.db.leases import GuardedSessions, Lease, LeaseLostError
from service.dispatch import observe, record
from service.dispatch.launcher import Launcher, LauncherUnavailableError, Submission
from service.dispatch.observe import Leftover, Observed
from service.dispatch.troubles import Troubles
from service.domain.decide import (
    Action,
    Change,
    ForceStop,
    Keep,
    Launch,
    Limits,
    Lost,
    NoteSubmitted,
    Sight,
    Submit,
    decide,
    ready,
)
from service.domain.lifecycle import HOLDS_WORKERS
from service.domain.names import log_prefix, submission_id
from service.domain.queueing import Candidate, Load, Needs, admit
from service.domain.retry import Backoff
from service.store.base import ObjectStore, StoreError

logger = logging.getLogger(__name__)

_ASKED_AT_ONCE = 8  # all calls about jobs go through one agent on Ray's head
_UNANSWERED = 3  # questions about what should be over, then the next pass asks again
_TAIL_LINES = 200
_QUOTED_LINES = 6
_MAX_MESSAGE_CHARS = 4000
# Only the head of the queue can start. The rest is looked at now and then, to be told why it waits, so
# that a place is given away in time however long the queue is.
_QUEUE_HEAD = 200
_WHOLE_QUEUE_EVERY_S = 5.0
_WHOLE_QUEUE_PAUSE = 4  # at least so many times as long as such a pass took


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the dispatcher is told by the settings."""

    limits: Limits
    backoff: Backoff
    max_active: int
    worker_command: tuple[str, ...]  # interpreter, then -m workers
    public_url: str  # of the api, as workers reach it
    secret: str


class Reconciler:
    """Brings the cluster and the database into agreement."""

    def __init__(
        self,
        sessions: Sessions,
        launcher: Launcher,
        store: ObjectStore,
        *,
        lease: Lease,
        rules: Rules,
        on_doing: Callable[[str], object] = logger.debug,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_doing` hears what a pass does, so that one that takes long can be explained."""
        self._sessions, self._launcher, self._store = sessions, launcher, store
        self._guarded = GuardedSessions(sessions=sessions, lease=lease)
        self._rules, self._clock, self._monotonic = rules, clock, monotonic
        self._on_doing = on_doing
        self._gone_since: dict[str, float] = {}  # submission: when we first saw it ended or missing
        self._troubles = Troubles(
            self._guarded, what="the dispatcher cannot go on with it", clock=clock, monotonic=monotonic
        )
        self._unreadable: frozenset[str] = frozenset()  # in the last pass
        self._complained = ""
        self._whole_queue_at = -math.inf  # when it is due

    async def run_once(self) -> None:
        """Do for every open job the next thing that it needs.

        What goes wrong for one of them is that job's trouble alone. Raises LeaseLostError once another
        dispatcher may be at it, and what the database raises when it is away; the rest is dropped then.
        """
        began = self._monotonic()
        whole = began >= self._whole_queue_at
        self._on_doing("reading the jobs")
        self._troubles.begin()
        resting = self._troubles.resting
        found = await observe.open_jobs(
            self._sessions,
            now=self._clock(),
            most_queued=None if whole else _QUEUE_HEAD,
            without=self._unreadable & resting,
        )
        for job_id, error in found.unreadable.items():
            if await self._troubles.note(job_id, error):
                async with self._troubles.turn(job_id):
                    await record.end_unreadable(self._guarded, job_id, now=self._clock())
        jobs = found.jobs
        self._unreadable = (self._unreadable & resting) | found.unreadable.keys()
        turns = [observed for observed in jobs if observed.job.id not in resting]
        self._on_doing("asking Ray about its jobs and nodes")
        sights = await self._look(jobs, resting)
        now = self._clock()
        # One whose turns come to nothing holds no place once Ray surely runs nothing of it.
        holding = [o for o in jobs if o.job.state in HOLDS_WORKERS]
        holding = [o for o in holding if o.job.id not in resting or not sights[o.job.id].gone]
        admissions = await self._admissions(turns, holding, sights, now=now)
        await self._serve(turns, sights, admissions, now=now)
        self._on_doing("ending what earlier attempts left in the cluster")
        await self._clear_up()
        await self._troubles.end()
        if whole:
            ended = self._monotonic()
            self._whole_queue_at = ended + max(_WHOLE_QUEUE_EVERY_S, _WHOLE_QUEUE_PAUSE * (ended - began))

    async def _serve(
        self,
        turns: Sequence[Observed],
        sights: Mapping[str, Sight],
        admissions: Mapping[str, str | None],
        *,
        now: datetime,
    ) -> None:
        """Decide for each job and act on it; what they only have to say is written for all at once."""
        reasons: list[tuple[moves.Seen, str]] = []
        for observed in turns:
            job, limits = observed.job, self._rules.limits
            async with self._troubles.turn(job.id):
                decided = decide(
                    job, sights[job.id], admission=admissions.get(job.id), now=now, limits=limits
                )
                if not isinstance(decided, Keep):
                    self._on_doing(f"job {job.id}: {type(decided).__name__}")
                    await self._act(observed, decided)
                elif decided.reason not in (None, observed.reason):
                    reasons.append((observed.seen, decided.reason))
        self._on_doing("writing why jobs wait")
        await self._write_reasons(reasons, now=now)

    async def _write_reasons(self, reasons: Sequence[tuple[moves.Seen, str]], *, now: datetime) -> None:
        """Together, because a queue may have thousands; one by one where that fails."""
        try:
            await record.reasons(self._guarded, reasons, now=now)
        except LeaseLostError:
            raise
        except Exception as error:
            if is_outage(error):
                raise
            for one in reasons:
                async with self._troubles.turn(one[0].id):
                    await record.reasons(self._guarded, [one], now=now)

    async def _look(self, jobs: Sequence[Observed], resting: Collection[str]) -> dict[str, Sight]:
        """What the cluster says about the latest attempt of each job."""
        sights = {observed.job.id: Sight() for observed in jobs}
        # A queued one may have an earlier attempt that still ends: its user resumed or retried it.
        shown = (o for o in jobs if o.job.attempt > 0 and o.job.state is not JobState.PAUSED)

        async def look() -> None:
            for observed in shown:  # each takes the next one
                job_id = observed.job.id
                sights[job_id] = Sight(known=False)
                try:
                    sights[job_id] = await self._sight(observed.submission_id)
                except Exception as error:  # such as an id that is no part of an address
                    if job_id not in resting:
                        await self._troubles.note(job_id, error)

        await asyncio.gather(*(look() for _ in range(_ASKED_AT_ONCE)))
        return sights

    async def _sight(self, submission: str) -> Sight:
        try:
            job = await self._launcher.status(submission)
        except LauncherUnavailableError as error:
            self._complain(error)
            return Sight(known=False)
        if job is not None and not job.state.ended:
            self._gone_since.pop(submission, None)
            return Sight(job=job)
        since = self._gone_since.setdefault(submission, self._monotonic())
        return Sight(job=job, gone_for_s=self._monotonic() - since)

    async def _admissions(
        self,
        turns: Iterable[Observed],
        holding: Iterable[Observed],
        sights: Mapping[str, Sight],
        *,
        now: datetime,
    ) -> Mapping[str, str | None]:
        """Which of the ready jobs may start beside those that hold places; the others with why they wait."""
        waiting = [observed for observed in turns if ready(observed.job, sights[observed.job.id], now=now)]
        if not waiting:
            return {}
        try:
            capacity = await self._launcher.capacity()
        except LauncherUnavailableError as error:
            self._complain(error)
            return {observed.job.id: f"waiting: {error}" for observed in waiting}
        active = [observed.job.needs for observed in holding]
        load = Load(
            capacity=capacity,
            in_use=sum(active, Needs()),
            num_active=len(active),
            max_active=self._rules.max_active,
        )
        return admit((_candidate(observed) for observed in waiting), load)

    async def _act(self, observed: Observed, decided: Action) -> None:
        job, now = observed.job, self._clock()
        match decided:
            case Change():
                await self._change(observed, decided)
            case Launch():
                await self._launch(observed)
            case Submit():
                await self._submit_again(observed)
            case NoteSubmitted():
                await record.submitted(self._guarded, job.id, job.attempt, now=now)
            case ForceStop():
                await self._stop(job.id, job.attempt)
            case Lost():
                await self._lose(observed, decided)
            case _:
                assert_never(decided)

    async def _launch(self, observed: Observed) -> None:
        number = await record.raise_fence(self._guarded, observed, now=self._clock())
        if number is not None:
            await self._submit(observed.job.id, number)

    async def _submit_again(self, observed: Observed) -> None:
        if await record.is_current(self._guarded, observed.seen):
            await self._submit(observed.job.id, observed.job.attempt)

    async def _submit(self, job_id: str, attempt: int) -> None:
        rules = self._rules
        told = ("--url", rules.public_url, "--attempt", f"{job_id}/{attempt}")
        await self._launcher.submit(
            Submission(
                id=submission_id(job_id, attempt),
                command=(*rules.worker_command, *told),
                env={"CIM_CLAIM_CODE": claim_code(rules.secret, job_id, attempt)},
            )
        )
        await record.submitted(self._guarded, job_id, attempt, now=self._clock())
        logger.info("job %s: attempt %d submitted", job_id, attempt)

    async def _change(self, observed: Observed, decided: Change) -> None:
        if await record.change(self._guarded, observed, decided, now=self._clock()):
            job = observed.job
            logger.info("job %s: %s -> %s (%s)", job.id, job.state, decided.dst, decided.reason)

    async def _stop(self, job_id: str, attempt: int) -> None:
        """Decided for an attempt that shall never go on, so it is as right later as it is now."""
        await record.stop_sent(self._guarded, job_id, attempt, now=self._clock())
        await self._launcher.stop(submission_id(job_id, attempt))

    async def _lose(self, observed: Observed, lost: Lost) -> None:
        job = observed.job
        tail = [printable(redacted(line)) for line in await self._last_lines(observed.submission_id)]
        await self._keep_log(observed, tail)
        quoted = [line.strip() for line in tail if line.strip()][-_QUOTED_LINES:]
        message = printable(lost.message) + ("; its last lines: " + " | ".join(quoted) if quoted else "")
        told = Lost(kind=lost.kind, message=message[:_MAX_MESSAGE_CHARS])
        backoff, now = self._rules.backoff, self._clock()
        if await record.lost(self._guarded, observed, told, backoff=backoff, now=now):
            logger.warning("job %s: attempt %d is lost: %s", job.id, job.attempt, told.message)
            # Only now: an attempt that is found to live after all must not be ended. Should we die
            # here, it is a leftover, or stands in the way of the next attempt, and is ended as such.
            await self._launcher.stop(observed.submission_id)

    async def _last_lines(self, submission: str) -> list[str]:
        """What the driver said last; nothing where the cluster does not answer."""
        try:
            return await self._launcher.log_tail(submission, max_lines=_TAIL_LINES)
        except LauncherUnavailableError as error:
            self._complain(error)
            return []

    async def _keep_log(self, observed: Observed, tail: list[str]) -> None:
        """Save the driver's last words: Ray loses them with its node."""
        if not tail:
            return
        job, at = observed.job, self._clock()
        lines = [
            LogLine(at=at, attempt=job.attempt, source="ray", level="error", message=text) for text in tail
        ]
        data = "".join(line.model_dump_json() + "\n" for line in lines).encode()
        key = f"{log_prefix(job.id, job.attempt)}ray-000001.jsonl"
        try:
            await asyncio.to_thread(self._store.put_bytes, key, data)
        except StoreError as error:
            logger.warning("job %s: the log's tail was not kept: %s", job.id, error)

    async def _clear_up(self) -> None:
        """See to the attempts that should be over; one that does not answer holds up no pass."""
        left = _UNANSWERED
        for leftover in await observe.leftovers(self._sessions, without=self._troubles.resting):
            async with self._troubles.turn(leftover.job_id):
                left -= not await self._clear_away(leftover)
            if not left:
                return

    async def _clear_away(self, leftover: Leftover) -> bool:
        """End an attempt whose job has gone on without it, after a grace in which it may do so itself.

        Returns:
            False if the cluster did not answer.
        """
        try:
            sight = await self._sight(leftover.submission_id)
            now = self._clock()
            if sight.gone:
                await record.gone(self._guarded, leftover.job_id, leftover.attempt, now=now)
                self._gone_since.pop(leftover.submission_id, None)
            elif (
                sight.known and (now - leftover.over_since).total_seconds() >= self._rules.limits.stop_grace_s
            ):
                await self._stop(leftover.job_id, leftover.attempt)
        except LauncherUnavailableError as error:
            self._complain(error)
            return False
        return sight.known

    def _complain(self, error: LauncherUnavailableError) -> None:
        # An outage would fill the log with the same line, one a second.
        if str(error) != self._complained:
            logger.warning("%s", error)
            self._complained = str(error)


def _candidate(observed: Observed) -> Candidate:
    job = observed.job
    return Candidate(job_id=job.id, priority=job.priority, created_at=job.created_at, needs=job.needs)
