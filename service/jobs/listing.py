"""Pages of jobs, newest first. A cursor names the last job of a page, so new jobs shift nothing."""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import JobPage, JobState, JobView
from service.contracts.problems import FieldProblem
from service.contracts.specs import NAME_PATTERN
from service.contracts.storable import is_text
from service.db import queries
from service.errors import InvalidSpecError
from service.jobs.damaged import UNKNOWN
from service.jobs.readiness import notice
from service.jobs.views import to_views

_NAME = re.compile(NAME_PATTERN)


class InvalidQueryError(InvalidSpecError):
    """A parameter of a request cannot be read."""

    code, title = "invalid_request", "The request is not valid"


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a client asked to see."""

    states: Sequence[JobState] = ()
    kinds: Sequence[str] = ()
    name: str | None = None
    labels: Sequence[str] = ()  # key=value
    text: str | None = None
    limit: int = 50
    cursor: str | None = None


async def page(session: AsyncSession, query: Query, *, mlflow_url: str | None) -> JobPage:
    """One page, and the cursor of the next where there is one."""
    wanted = queries.JobFilter(
        states=query.states,
        kinds=query.kinds,
        name=query.name,
        labels=dict(_label(label) for label in query.labels),
        text=query.text,
    )
    before = _position(query.cursor) if query.cursor else None
    rows = await queries.page(session, wanted, limit=query.limit + 1, before=before)
    views = await to_views(session, rows[: query.limit], mlflow_url=mlflow_url)
    views = [view for view in views if view.created_at != UNKNOWN]  # it has no place in the order
    return JobPage(
        jobs=views,
        next_cursor=_cursor(views[-1]) if views and len(rows) > query.limit else None,
        notice=await notice(session),
    )


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or _NAME.fullmatch(key) is None:
        raise _invalid("label", "must look like key=value, the key as labels may be called", text)
    return key, value


def _cursor(last: JobView) -> str:
    text = json.dumps([last.created_at.isoformat(), last.id])
    return base64.urlsafe_b64encode(text.encode()).decode()


def _position(cursor: str) -> tuple[datetime, str]:
    try:
        moment, job_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        given = datetime.fromisoformat(moment)
        at = given.astimezone(UTC)
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _invalid("cursor", "must be the next_cursor of an earlier page", cursor) from error
    if given.tzinfo is None or not isinstance(job_id, str) or not is_text(job_id):
        raise _invalid("cursor", "must be the next_cursor of an earlier page", cursor)
    return at, job_id


def _invalid(name: str, rule: str, value: str) -> InvalidQueryError:
    return InvalidQueryError([FieldProblem(path=name, message=f"{rule}, got {value!r}", value=value)])
