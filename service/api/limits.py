"""Requests that are refused before anything reads them: too large in some way, or with a NUL in them."""

from urllib.parse import unquote_to_bytes

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_of, problem_response
from service.contracts.problems import Problem

MAX_BODY_BYTES = 1 << 20
MAX_REPORT_BYTES = 2 << 20  # a thousand points and as many files, twice over
MAX_WORKER_BODY_BYTES = 16 << 20  # a manifest of tens of thousands of files
MAX_ADDRESS_BYTES = 8 << 10
MAX_HEADERS = 64
MAX_HEADER_BYTES = 32 << 10
_WORKERS, _REPORT = "/v1/attempts/", "/report"


class Limits:
    """An ASGI middleware. A body without a declared length is counted while it arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400, 413, 414 or 431."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (problem := _fault(scope)) is not None:
            await problem_response(problem)(scope, receive, send)
            return
        limit = _limit(scope["path"])
        if _declared(scope) > limit:
            await problem_response(problem_of(413, detail=_told(limit)))(scope, receive, send)
            return
        await self._app(scope, _counting(receive, limit), send)


def _limit(path: str) -> int:
    """Bytes that a body may have."""
    if not path.startswith(_WORKERS):
        return MAX_BODY_BYTES
    return MAX_REPORT_BYTES if path.endswith(_REPORT) else MAX_WORKER_BODY_BYTES


def _fault(scope: Scope) -> Problem | None:
    """What is wrong with address and headers."""
    query: bytes = scope.get("query_string", b"")
    if len(scope["path"].encode()) + len(query) > MAX_ADDRESS_BYTES:
        return problem_of(414, detail=f"an address may have at most {MAX_ADDRESS_BYTES} bytes")
    if "\x00" in scope["path"] or b"\x00" in unquote_to_bytes(query):
        return problem_of(400, detail="an address must not hold a NUL character")
    headers: list[tuple[bytes, bytes]] = list(scope["headers"])
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        told = f"a request may have at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all"
        return problem_of(431, detail=told)
    if any(b"\x00" in value for _, value in headers):
        return problem_of(400, detail="a header must not hold a NUL character")
    return None


def _declared(scope: Scope) -> int:
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(value[:19]) if value.isdigit() else 0


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
