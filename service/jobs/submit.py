"""Queue the jobs of one request: all of them or none, and once for each idempotency key."""

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.allowed import Allowed
from service.contracts.parsing import AnySpec, at, parse_all, place
from service.contracts.problems import FieldProblem
from service.contracts.resolving import resolve
from service.db import moves, queries
from service.db.tables import JobRow, SubmissionRow
from service.domain.names import new_job_id
from service.errors import InvalidSpecError, KeyReusedError, NotFoundError
from service.jobs import references, uris
from service.jobs.looks import Looks

MOST_JOBS = 100
_LOOK_LIMIT_S = 5.0  # for all addresses of a request


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The jobs of a request, in its order; `created` is False where they were there before."""

    rows: list[JobRow]
    created: bool


async def submit(
    session: AsyncSession,
    documents: Sequence[Any],
    *,
    key: str | None,
    allowed: Allowed,
    shared_filesystem: bool,
    looks: Looks,
    now: datetime,
) -> Submitted:
    """Queue a job for each document, or return the jobs that `key` has already made.

    `session` must not have begun: the specs are judged, and folders looked at, before its
    transaction opens.

    Raises:
        InvalidSpecError: with the mistakes of all documents.
        KeyReusedError: the key came with other documents before.
    """
    specs = await asyncio.to_thread(parsed, documents)  # a second for the worst that a body can hold
    found = await judged_uris(specs, allowed=allowed, shared_filesystem=shared_filesystem, looks=looks)
    ids = [new_job_id() for _ in specs]
    if key is not None:
        digest = _digest(documents)
        row = {"key": key, "spec_hash": digest, "job_ids": ids, "created_at": now}
        if (earlier := await queries.claim_key(session, row)) is not None:
            return Submitted(rows=await _made_before(session, earlier, digest), created=False)
    links = await references.link(session, specs, ids)
    if found.problems or links.problems:
        raise InvalidSpecError([*found.problems, *links.problems])
    rows = [
        # A microsecond apart, so that "newest first" and "the latest of that name" have an answer.
        _enqueue(session, spec, document, job_id, targets, now=now + timedelta(microseconds=number))
        for number, (spec, document, job_id, targets) in enumerate(
            zip(specs, documents, ids, links.targets, strict=True)
        )
    ]
    await session.flush()
    return Submitted(rows=rows, created=True)


async def judged_uris(
    specs: Sequence[AnySpec], *, allowed: Allowed, shared_filesystem: bool, looks: Looks
) -> uris.Judged:
    """What is wrong with the addresses of data in these specs; looks at folders for a few seconds at most."""
    deadline = time.monotonic() + _LOOK_LIMIT_S
    found = uris.Judged(problems=[], unseen=[])
    for number, spec in enumerate(specs):
        one = await uris.judge(
            spec, allowed=allowed, shared_filesystem=shared_filesystem, looks=looks, deadline=deadline
        )
        where = place(number, len(specs))
        found.problems.extend(at(where, problem) for problem in one.problems)
        found.unseen.extend(where + path for path in one.unseen)
    return found


def parsed(documents: Sequence[Any]) -> list[AnySpec]:
    """The specs; `InvalidSpecError` for none, too many, and every mistake in them."""
    if not 1 <= len(documents) <= MOST_JOBS:
        told = f"a request must hold 1 to {MOST_JOBS} specs, got {len(documents)}"
        raise InvalidSpecError([FieldProblem(path="spec", message=told)])
    specs = parse_all(documents)
    if twice := references.duplicates(specs):
        raise InvalidSpecError(twice)
    return specs


def _enqueue(
    session: AsyncSession,
    spec: AnySpec,
    document: Any,
    job_id: str,
    targets: dict[str, str],
    *,
    now: datetime,
) -> JobRow:
    values = {
        "name": spec.name,
        "kind": spec.kind,
        "priority": spec.priority,
        "labels": spec.labels,
        "spec": document,
        "resolved": references.replaced(resolve(spec), targets),
        "inputs_wait": sorted(targets.values()),
        "max_attempts": spec.retries.max_attempts,
    }
    return moves.enqueue(session, job_id=job_id, now=now, values=values)


async def _made_before(session: AsyncSession, earlier: SubmissionRow, digest: str) -> list[JobRow]:
    if earlier.spec_hash != digest:
        made = ", ".join(earlier.job_ids)
        raise KeyReusedError(
            f"key {earlier.key!r} already made {made} from another spec; use a new key for a new job"
        )
    rows = await queries.jobs_by_id(session, earlier.job_ids)
    if missing := [job_id for job_id in earlier.job_ids if job_id not in rows]:
        raise NotFoundError(f"key {earlier.key!r} made {', '.join(missing)}, which no longer exists")
    return [rows[job_id] for job_id in earlier.job_ids]


def _digest(documents: Sequence[Any]) -> str:
    """The same for the same documents, whatever the order of their keys."""
    text = json.dumps(list(documents), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
