"""For load balancers and people."""

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import RedirectResponse

from service.api.deps import App, ReadSession
from service.contracts.base import Stored
from service.contracts.problems import Problem
from service.jobs.readiness import Readiness, readiness

router = APIRouter(tags=["health"])


class Alive(Stored):
    """The process answers."""

    status: Literal["ok"] = "ok"


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """The first thing that a person wants to see."""
    return RedirectResponse("/docs")


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Alive:
    """Answers as long as the process does, whatever else is away."""
    return Alive()


@router.get(
    "/readyz", summary="Can it serve?", responses={503: {"model": Problem, "description": "Not now."}}
)
async def readyz(session: ReadSession, app: App) -> Readiness:
    """200 when the database answers and its schema is the one that this version was written for.

    `leases` tells which dispatcher does what, and `notice` why nothing is dispatched where no pass has come
    to its end for 30 s. A process that is a dispatcher too (`cim up`) answers 503 then.
    """
    return await readiness(session, dispatches=app.dispatches)
