"""HTTP for what a user wants of a job. Each verb may be repeated."""

from typing import Any

from fastapi import APIRouter, status

from service.api.deps import App, Ref, Session
from service.api.routes.jobs import UNKNOWN
from service.contracts.jobs import JobView
from service.contracts.problems import Problem
from service.domain.wishes import Verb
from service.jobs import wishes
from service.jobs.views import to_view

ASKED: dict[int | str, dict[str, Any]] = {
    **UNKNOWN,
    409: {
        "model": Problem,
        "description": "The verb does not fit the job's state; the detail says which does.",
    },
}

router = APIRouter(prefix="/v1/jobs/{ref}", tags=["jobs"])


async def _ask(ref: str, verb: Verb, session: Session, app: App) -> JobView:
    row = await wishes.ask_any(session, ref, verb, now=app.clock())
    return await to_view(session, row, mlflow_url=app.settings.mlflow_browser_url)


@router.post("/cancel", status_code=status.HTTP_202_ACCEPTED, summary="Cancel a job", responses=UNKNOWN)
async def cancel_job(ref: Ref, session: Session, app: App) -> JobView:
    """A waiting job is cancelled at once; a running one saves a checkpoint and stops.

    Repeating it, or cancelling a job that is over, changes nothing.
    """
    return await _ask(ref, Verb.CANCEL, session, app)


@router.post("/pause", status_code=status.HTTP_202_ACCEPTED, summary="Pause a job", responses=ASKED)
async def pause_job(ref: Ref, session: Session, app: App) -> JobView:
    """A waiting job is paused at once; a running one saves a checkpoint and gives its workers back.

    Repeating it changes nothing; a job that is over or being cancelled answers 409.
    """
    return await _ask(ref, Verb.PAUSE, session, app)


@router.post("/resume", status_code=status.HTTP_202_ACCEPTED, summary="Resume a job", responses=ASKED)
async def resume_job(ref: Ref, session: Session, app: App) -> JobView:
    """Queue a paused job again; it goes on from its last checkpoint. Running jobs are left alone.

    A job that is over or being cancelled answers 409.
    """
    return await _ask(ref, Verb.RESUME, session, app)


@router.post("/retry", status_code=status.HTTP_202_ACCEPTED, summary="Retry a job", responses=ASKED)
async def retry_job(ref: Ref, session: Session, app: App) -> JobView:
    """Queue a failed or cancelled job again, from its last checkpoint and with all attempts anew.

    One that waits for its next attempt gets it now; one that waits or runs anyway is left alone. A job
    that succeeded, is paused or stopping answers 409.
    """
    return await _ask(ref, Verb.RETRY, session, app)
