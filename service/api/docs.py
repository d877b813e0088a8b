"""The API page, served from files of a package: it works without a network."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from service.api.errors import MEDIA_TYPE
from service.contracts.problems import Problem

_ASSETS = "/docs/assets"
_FIRST_ERROR = 400
_TOO_LARGE = 413
_ANYWHERE = {
    "Unreadable": (400, "Address, headers or body cannot be read."),
    "ForeignPage": (403, "A page of another site asks."),
    "TooLarge": (_TOO_LARGE, "The body is too large."),
    "TooLongAddress": (414, "The address is too long."),
    "Misdirected": (421, "The Host header names another service."),
    "TooLargeHeaders": (431, "There are too many headers, or too large ones."),
}

DESCRIPTION = """
Self-supervised visual pre-training with Corrupted Image Modeling: post a spec, get an encoder.

1. `POST /v1/jobs` queues a job (or several at once: `job:NAME` in one spec waits for another).
2. `GET /v1/jobs/{ref}` shows how far it is; `/events`, `/logs`, `/metrics` show why.
3. `GET /v1/jobs/{ref}/artifacts` lists what it made: `encoder/` loads with plain timm.

A job is named by its id, by a unique beginning of the id, or by its name, which means the latest
job of that name. Every error is a problem document (RFC 9457) with a stable `code`.
"""


def install(app: FastAPI) -> None:
    """Serve `/docs` and `/openapi.json`."""
    folder = files("fastapi_offline").joinpath("static")
    app.mount(_ASSETS, StaticFiles(directory=str(folder)), name="docs-assets")
    app.add_route("/docs", lambda request: _page(app, str(request.scope.get("root_path", ""))))
    # FastAPI asks for the document through this attribute.
    app.openapi = lambda: document(app)  # type: ignore[method-assign]


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; errors are problems."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        schema["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        schema["components"]["responses"] = {name: _refusal(told) for name, (_, told) in _ANYWHERE.items()}
        for operations in schema["paths"].values():
            for operation in operations.values():
                _say_problem(operation["responses"])
                _say_refusals(operation)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema


def _refusal(told: str) -> dict[str, Any]:
    """A response of the document that any request may be answered with."""
    return {
        "description": told,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _say_refusals(operation: dict[str, Any]) -> None:
    for name, (status, _) in _ANYWHERE.items():
        if status != _TOO_LARGE or "requestBody" in operation:
            operation["responses"].setdefault(str(status), {"$ref": f"#/components/responses/{name}"})
    operation["responses"] = dict(sorted(operation["responses"].items()))


def _say_problem(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        if status.isdigit() and int(status) >= _FIRST_ERROR and "content" in response:
            response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def _page(app: FastAPI, root: str) -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url=f"{root}{app.openapi_url}",
        title=app.title,
        swagger_js_url=f"{root}{_ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{_ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{_ASSETS}/favicon.png",
        swagger_ui_parameters={"defaultModelsExpandDepth": 0, "displayRequestDuration": True},
    )
