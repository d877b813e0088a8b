"""The composition of the API. Nothing here reads the environment or starts a server."""

from importlib.metadata import version

from fastapi import FastAPI

from service.api import docs, errors
from service.api.deps import Clock, Services, utc_now
from service.api.hosts import Hosts
from service.api.limits import Limits
from service.api.routes import attempts, details, health, jobs, recipes, wishes
from service.db.engine import Sessions
from service.jobs.costs import ChildCosts, Costs
from service.jobs.looks import Looks
from service.settings import Settings
from service.store.base import ObjectStore

_TAGS = [
    {"name": "jobs", "description": "Submit, watch and end jobs."},
    {"name": "details", "description": "What a job said and made."},
    {"name": "recipes", "description": "Specs to start from."},
    {
        "name": "workers",
        "description": "The workers' side; the claim carries a code, every other call the attempt's token.",
    },
    {"name": "health", "description": "For load balancers and people."},
]
_ROUTES = (jobs, wishes, details, recipes, attempts, health)


def create_app(
    settings: Settings,
    sessions: Sessions,
    store: ObjectStore,
    *,
    costs: Costs | None = None,
    clock: Clock = utc_now,
    poll_s: float = 0.5,
    dispatches: bool = False,
) -> FastAPI:
    """The API on these services.

    Args:
        settings: As the entry point read them.
        sessions: Of a database at the present schema; `/readyz` tells if it is not.
        store: Where artifacts and logs lie.
        costs: Counts what a training takes; by default in child processes.
        clock: The present moment, aware.
        poll_s: Seconds between two looks of a stream that follows a job.
        dispatches: This process is a dispatcher too, and `/readyz` speaks for both.
    """
    app = FastAPI(
        title="CIM service",
        version=version("cim-service"),
        description=docs.DESCRIPTION,
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = Services(
        settings=settings,
        sessions=sessions,
        store=store,
        costs=costs or ChildCosts(),
        looks=Looks(),
        clock=clock,
        poll_s=poll_s,
        dispatches=dispatches,
    )
    for routes in _ROUTES:
        app.include_router(routes.router)
    errors.install(app)
    docs.install(app)
    app.add_middleware(Limits)
    app.add_middleware(Hosts, public_url=settings.public_url)
    return app
