"""HTTP for what a job said and made: events, metrics, logs, artifacts."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from service.api import ranges
from service.api.deps import App, Artifact, Follow, JobId, LastEventId, ReadSession, Ref
from service.contracts.jobs import EventView, FileEntry, LogLine, MetricPoint
from service.contracts.problems import Problem
from service.jobs import artifacts as artifacts_of
from service.jobs import events as events_of
from service.jobs import logs as logs_of
from service.jobs import metrics as metrics_of

_PING_S = 15
_LINES_A_CHUNK = 500
_END = ServerSentEvent(event="end", data="{}")

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such job or file."}}

_EVENT = {
    "type": "object",
    "description": "With `follow=true`: one for each item, `data` is its JSON; the last one is named `end`.",
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}

router = APIRouter(prefix="/v1/jobs/{ref}", tags=["details"], responses=UNKNOWN)


@router.get("/events", summary="What happened to a job", response_model=list[EventView], responses=STREAM)
async def show_events(
    job_id: JobId, app: App, *, follow: Follow = False, last_event_id: LastEventId = None
) -> Any:
    """Every move from state to state and everything else worth telling, oldest first."""
    if not follow:
        return await events_of.events(app.sessions, job_id)
    after = events_of.from_cursor(last_event_id)
    found = events_of.follow(app.sessions, job_id, after=after, poll_s=app.poll_s)
    return EventSourceResponse(_event_stream(found), ping=_PING_S)


@router.get("/metrics", summary="A job's curves")
async def show_metrics(
    ref: Ref,
    session: ReadSession,
    *,
    key: Annotated[str | None, Query(description="Only this curve.")] = None,
    latest: Annotated[bool, Query(description="Only the last point of each curve.")] = False,
    after_step: Annotated[int, Query(ge=-1, le=2**62, description="Only points beyond this step.")] = -1,
) -> list[MetricPoint]:
    """Points by step and key, at most 100,000; `after_step` gets the rest."""
    return await metrics_of.metrics(session, ref, key=key, latest=latest, after_step=after_step)


@router.get("/logs", summary="What a job's workers printed", response_model=list[LogLine], responses=STREAM)
async def show_logs(
    job_id: JobId, app: App, *, follow: Follow = False, last_event_id: LastEventId = None
) -> Any:
    """Lines of all attempts and all processes, by time."""
    if not follow:
        lines = await asyncio.to_thread(logs_of.read, app.store, job_id)
        return StreamingResponse(_json_array(lines), media_type="application/json")
    mark = logs_of.from_cursor(last_event_id)
    sent = logs_of.follow(app.sessions, app.store, job_id, after=mark, poll_s=app.poll_s)
    return EventSourceResponse(_log_stream(sent), ping=_PING_S)


@router.get("/artifacts", summary="What a job made")
async def list_artifacts(ref: Ref, session: ReadSession) -> list[FileEntry]:
    """Every finished file with size and SHA-256, by path."""
    return await artifacts_of.artifacts(session, ref)


@router.get(
    "/artifacts/{path:path}",
    summary="Fetch a file",
    response_class=StreamingResponse,
    responses={
        206: {"description": "The part that `Range` asked for."},
        307: {"description": "Where it lies."},
    },
)
async def fetch_artifact(
    found: Artifact,
    app: App,
    *,
    redirect: Annotated[bool, Query(description="Allow a redirect to the object store.")] = True,
    wanted: Annotated[str | None, Header(alias="Range")] = None,
) -> Response:
    """The bytes, or a redirect to a presigned address where the object store has such a thing."""
    address = await asyncio.to_thread(app.store.presign, found.key) if redirect else None
    if address is not None:
        return RedirectResponse(address, status_code=307)
    size = found.entry.size
    part = ranges.wanted(wanted, size=size)
    start, end = part or (0, size)
    chunks = await asyncio.to_thread(artifacts_of.read, app.store, found, start=start, end=end)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(end - start),
        "ETag": f'"{found.entry.sha256}"',
        "X-Content-Type-Options": "nosniff",
    }
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if part else 200
    return StreamingResponse(chunks, status_code=status, media_type=found.content_type, headers=headers)


async def _event_stream(found: AsyncIterator[EventView]) -> AsyncIterator[ServerSentEvent]:
    async for event in found:
        yield ServerSentEvent(data=event.model_dump_json(), id=str(event.id))
    yield _END


async def _log_stream(found: AsyncIterator[logs_of.Sent]) -> AsyncIterator[ServerSentEvent]:
    async for sent in found:
        place = logs_of.to_cursor(sent.mark) if sent.mark is not None else None
        yield ServerSentEvent(data=sent.line.model_dump_json(), id=place)
    yield _END


def _json_array(lines: Iterator[LogLine]) -> Iterator[str]:
    opening = "["
    while chunk := list(islice(lines, _LINES_A_CHUNK)):
        yield opening + ",".join(line.model_dump_json() for line in chunk)
        opening = ","
    yield "[]" if opening == "[" else "]"
