"""HTTP for jobs. A route names its inputs, calls one use case, returns one contract."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Response, status
from pydantic import SkipValidation

from service.api.deps import App, IdempotencyKey, ReadSession, Ref, Session
from service.api.routes.examples import SPECS
from service.contracts.changes import JobChange
from service.contracts.jobs import FINAL, JobPage, JobState, JobView, Validation
from service.contracts.problems import FieldProblem, Problem
from service.contracts.specs import Spec
from service.errors import InvalidSpecError
from service.jobs import change as changing
from service.jobs import listing, references
from service.jobs import submit as submitting
from service.jobs import validate as validating
from service.jobs.readiness import notice
from service.jobs.views import to_view, to_views

INVALID: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "Every mistake, with its dotted path."}
}
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such job."}}
REUSED: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "The idempotency key came with other specs before."}
}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

# Judged by `service.contracts.parsing`, which tells all mistakes; here only for the document.
Documents = Annotated[SkipValidation[Spec | list[Spec]], Body(openapi_examples=SPECS)]


def _listed(documents: Any) -> list[Any]:
    if isinstance(documents, bytes):
        told = "must be JSON, sent with the header Content-Type: application/json; `cim submit` reads YAML"
        raise InvalidSpecError([FieldProblem(path="body", message=told)])
    return documents if isinstance(documents, list) else [documents]


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Submit one spec or a list",
    responses={200: {"description": "The jobs that this key made before."}, **INVALID, **REUSED},
)
async def submit_jobs(
    documents: Documents,
    session: Session,
    app: App,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView | list[JobView]:
    """Queue jobs: all of the request or none.

    `job:NAME` means a spec of the same request first, then the latest job of that name; the new
    job stays queued until that one has succeeded. One spec is answered with one job, a list with
    a list.
    """
    settings = app.settings
    made = await submitting.submit(
        session,
        _listed(documents),
        key=idempotency_key,
        allowed=app.allowed,
        shared_filesystem=settings.shared_filesystem,
        looks=app.looks,
        now=app.clock(),
    )
    if not made.created:
        response.status_code = status.HTTP_200_OK
    views = await to_views(session, made.rows, mlflow_url=settings.mlflow_browser_url)
    return views if isinstance(documents, list) else views[0]


@router.post("/validate", summary="Ask about specs without submitting them", responses=INVALID)
async def validate_specs(documents: Documents, app: App) -> Validation:
    """The specs with every default filled in, what they will take, and warnings. Nothing is stored.

    Parameters, multiply-accumulates and memory are counted on the networks themselves, which takes some
    seconds the first time. Where they cannot be counted, a warning says why.
    """
    return await validating.validate(
        app.sessions,
        _listed(documents),
        allowed=app.allowed,
        shared_filesystem=app.settings.shared_filesystem,
        costs=app.costs,
        looks=app.looks,
    )


def _query(
    state: Annotated[
        list[JobState] | None, Query(max_length=16, description="May be given several times.")
    ] = None,
    kind: Annotated[list[str] | None, Query(max_length=16, description="May be given several times.")] = None,
    name: Annotated[str | None, Query(max_length=256, description="Exactly this name.")] = None,
    label: Annotated[
        list[str] | None, Query(max_length=16, description="`key=value`; all that are given must fit.")
    ] = None,
    q: Annotated[str | None, Query(max_length=256, description="Part of a name or id.")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[
        str | None, Query(max_length=256, description="`next_cursor` of the page before.")
    ] = None,
) -> listing.Query:
    return listing.Query(
        states=state or (),
        kinds=kind or (),
        name=name,
        labels=label or (),
        text=q,
        limit=limit,
        cursor=cursor,
    )


@router.get("", summary="List jobs, newest first", responses=INVALID)
async def list_jobs(
    query: Annotated[listing.Query, Depends(_query)], session: ReadSession, app: App
) -> JobPage:
    """One page. Pass `next_cursor` back as `cursor` for the next one; new jobs do not shift it."""
    return await listing.page(session, query, mlflow_url=app.settings.mlflow_browser_url)


@router.get("/{ref}", summary="Show a job", responses=UNKNOWN)
async def show_job(ref: Ref, session: ReadSession, app: App) -> JobView:
    """Everything about one job: state and reason, progress, latest metrics, attempts, both specs."""
    row = await references.find_or_id(session, ref)
    view = await to_view(session, row, mlflow_url=app.settings.mlflow_browser_url)
    return view if view.state in FINAL else view.model_copy(update={"notice": await notice(session)})


@router.patch("/{ref}", summary="Change name, priority or labels", responses={**UNKNOWN, **INVALID})
async def change_job(ref: Ref, wanted: JobChange, session: Session, app: App) -> JobView:
    """Only what is given changes; the spec stays as it was submitted."""
    row = await changing.change(session, ref, wanted, now=app.clock())
    return await to_view(session, row, mlflow_url=app.settings.mlflow_browser_url)
