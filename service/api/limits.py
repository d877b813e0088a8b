"""Requests that are refused before anything reads them: too large, or with a NUL in the address."""

from urllib.parse import unquote_to_bytes

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_of, problem_response

MAX_BODY_BYTES = 1 << 20
MAX_WORKER_BODY_BYTES = 16 << 20  # a manifest of tens of thousands of files
_WORKERS = "/v1/attempts/"


class Limits:
    """An ASGI middleware. A body without a declared length is counted while it arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _has_nul(scope):
            problem = problem_of(400, detail="an address must not hold a NUL character")
            await problem_response(problem)(scope, receive, send)
            return
        limit = MAX_WORKER_BODY_BYTES if scope["path"].startswith(_WORKERS) else MAX_BODY_BYTES
        if _declared(scope) > limit:
            await problem_response(problem_of(413, detail=_told(limit)))(scope, receive, send)
            return
        await self._app(scope, _counting(receive, limit), send)


def _has_nul(scope: Scope) -> bool:
    return "\x00" in scope["path"] or b"\x00" in unquote_to_bytes(scope.get("query_string", b""))


def _declared(scope: Scope) -> int:
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(value) if value.isdigit() else 0


def _counting(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise HTTPException(413, detail=_told(limit))
        return message

    return counted


def _told(limit: int) -> str:
    return f"a body may have at most {limit} bytes"
