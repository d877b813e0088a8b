"""HTTP for workers. Every call may be repeated; a stale attempt is told so with 409 and ends."""

from typing import Any

from fastapi import APIRouter

from service.api.deps import App, Attempt, Session, StartableAttempt
from service.contracts.base import Stored
from service.contracts.problems import Problem
from service.contracts.work import Assignment, Checkpoint, Claim, Finish, Report, ReportReply
from service.jobs import claim as claiming
from service.jobs import finish as finishing
from service.jobs import work

REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "Not this attempt's token, or not its code."},
    409: {"model": Problem, "description": "`stale_attempt`, `attempt_claimed`: write nothing more and end."},
}

router = APIRouter(prefix="/v1/attempts/{job_id}/{attempt}", tags=["workers"], responses=REFUSED)


class Taken(Stored):
    """It is committed."""

    taken: bool = True


@router.get("", summary="What an attempt has to do")
async def show_assignment(of: Attempt, session: Session, app: App) -> Assignment:
    """The resolved spec, where the inputs lie, and the checkpoint to resume from."""
    return await work.assignment(session, of.job_id, of.number, store=app.store_address, allowed=app.allowed)


@router.post("/claim", summary="Claim an attempt")
async def take_claim(of: StartableAttempt, told: Claim, app: App) -> Taken:
    """The first call of a worker, with the code that it was started with.

    From here on nothing but the token behind `token_hash` speaks for the attempt. Repeating it with
    the same token is harmless; with another one it is refused with 409 `attempt_claimed`.
    """
    await claiming.claim(app.sessions, of.job_id, of.number, told, now=app.clock())
    return Taken()


@router.post("/report", summary="Progress and metrics")
async def take_report(of: Attempt, told: Report, session: Session, app: App) -> ReportReply:
    """The answer says whether to go on or to save a checkpoint and stop."""
    return await work.report(session, of.job_id, of.number, told, now=app.clock())


@router.post("/checkpoints", summary="Commit a checkpoint")
async def take_checkpoint(of: Attempt, told: Checkpoint, app: App) -> Taken:
    """Its files must be stored; from here on it is the one to resume from."""
    await work.commit_checkpoint(app.sessions, app.store, of.job_id, of.number, told, now=app.clock())
    return Taken()


@router.post("/finish", summary="End an attempt")
async def take_finish(of: Attempt, told: Finish, app: App) -> Taken:
    """How it ended, with the manifest of the result; the job's next state follows from that."""
    await finishing.finish(
        app.sessions,
        app.store,
        of.job_id,
        of.number,
        told,
        backoff=app.settings.backoff,
        now=app.clock(),
    )
    return Taken()
