"""Every error becomes problem+json here, and nowhere else."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.contracts.addresses import without_secrets
from service.contracts.problems import FieldProblem, Problem
from service.db.failures import DatabaseFailure, kind_of
from service.errors import InvalidSpecError, ServiceError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_UNREADABLE = "There was an error parsing the body"  # FastAPI's words
_PLACES = {"body", "query", "path", "header"}


def install(app: FastAPI) -> None:
    """Let `app` answer every error with a problem."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SQLAlchemyError, _database_error)
    app.add_exception_handler(Exception, _unexpected)


def problem_response(problem: Problem, *, headers: Mapping[str, str] | None = None) -> Response:
    """`problem` as an answer."""
    return Response(
        problem.model_dump_json(),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=dict(headers or {}),
    )


def problem_of(status: int, *, code: str | None = None, detail: str = "") -> Problem:
    """A problem of a plain HTTP status."""
    phrase = HTTPStatus(status).phrase
    default = phrase.lower().replace(" ", "_")
    return Problem(title=phrase, status=status, code=code or default, detail=detail or phrase)


async def _service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s: %s", error.code, error)
    errors = error.errors if isinstance(error, InvalidSpecError) else []
    problem = Problem(
        title=error.title, status=error.status, code=error.code, detail=str(error), errors=errors
    )
    headers = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
    return problem_response(problem, headers=headers)


async def _invalid_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [without_secrets(_field_problem(detail)) for detail in error.errors()]
    detail = "; ".join(f"{one.path}: {one.message}" for one in errors)
    problem = Problem(
        title="The request is not valid", status=422, code="invalid_request", detail=detail, errors=errors
    )
    return problem_response(problem)


def _field_problem(detail: Mapping[str, Any]) -> FieldProblem:
    if detail["type"] == "json_invalid":
        why = detail.get("ctx", {}).get("error", "")
        return FieldProblem(path="body", message=f"must be JSON: {why} at character {detail['loc'][-1]}")
    parts = [str(part) for part in detail["loc"]]
    path = ".".join(parts[1:] if len(parts) > 1 and parts[0] in _PLACES else parts)
    if detail["type"] == "missing":
        return FieldProblem(path=path, message="is required")
    told = str(detail["msg"]).replace("Input should be", "must be").replace("String should", "must")
    given = repr(detail.get("input"))[:200]
    return FieldProblem(path=path, message=f"{told}, got {given}", value=given)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == _UNREADABLE:
        detail = "the body must be JSON in UTF-8"
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}; /docs lists every address"
    problem = problem_of(error.status_code, detail=detail)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    return problem_response(problem, headers=headers)


def _methods_at(request: Request) -> set[str]:
    """What may be done at an address: a router names the methods of its first route alone."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}


async def _database_error(request: Request, error: Exception) -> Response:
    match kind_of(error):
        case DatabaseFailure.CONNECTION:
            logger.error("the database does not answer: %s", error)
            # The reply to a commit may be what was lost.
            detail = (
                "the database does not answer, so it is not certain whether this request was carried out; "
                "try again, with the same Idempotency-Key where there was one"
            )
            return problem_response(problem_of(503, code="database_unavailable", detail=detail))
        case DatabaseFailure.CONTENTION:
            logger.error("the database is too busy: %s", error)
            detail = "the database is too busy with other requests; nothing was changed, try again"
            return problem_response(problem_of(503, code="database_busy", detail=detail))
        case _:
            return await _unexpected(request, error)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "something went wrong here; the log of the service has the details"
    return problem_response(problem_of(500, code="internal", detail=detail))
