"""Synchronous transport: one HTTP connection pool, errors as exceptions, retries with back-off."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from service.client.errors import BAD_ANSWER, ApiError, RefusedError, UnreachableError, api_error
from service.contracts.problems import Problem

T = TypeVar("T")

TOO_MANY = 429
CONFLICT = "conflict"  # two requests met; the service asks for a repetition
CONNECT_TIMEOUT_S = 5.0
OUTAGE_PATIENCE_S = 300.0  # a service that is being upgraded should not end a wait of days


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Pauses between tries: doubling from `first_s` to `longest_s`, each shortened at random."""

    first_s: float = 0.5
    longest_s: float = 15.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = field(default=random.random)  # in [0, 1)

    def pause_s(self, tries: int) -> float:
        """Seconds to wait after `tries` failures: between half of the pause and the whole."""
        longest = min(self.longest_s, self.first_s * 2.0 ** min(tries - 1, 30))
        return longest * (1 - self.jitter() / 2)


class Transport:
    """Sends requests to one service. Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        token: str | None = None,
        backoff: Backoff | None = None,
        refused_is_final: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = checked_url(url)
        self._refused_is_final = refused_is_final  # a person at a terminal would rather know at once
        self._backoff = backoff or Backoff()
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            headers={"Authorization": f"Bearer {token}"} if token else None,
            follow_redirects=True,  # artifacts may lie behind a presigned address
            transport=transport,
            trust_env=not _is_loopback(self.url),  # a company's proxy cannot reach this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(self, method: str, path: str, *, patience_s: float = 0.0, **request: Any) -> httpx.Response:
        """Send one request, again for `patience_s` seconds while the service is away.

        Only for requests that are safe to repeat may `patience_s` be above 0.

        Raises:
            ApiError: The service refused, or still failed when the patience ended; an
                `UnreachableError` when nothing answered.
        """
        return self.patiently(lambda: self._once(method, path, request), patience_s=patience_s)

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        read_timeout_s: float | None = None,
        **request: Any,
    ) -> Iterator[httpx.Response]:
        """GET an answer that is read piece by piece; errors as in `call`."""
        if read_timeout_s is not None:
            request["timeout"] = httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S)
        with self._translated(), self._http.stream("GET", path, headers=headers, **request) as response:
            if response.is_error:
                response.read()
                raise api_error(_problem(response))
            yield response

    def patiently(self, send: Callable[[], T], *, patience_s: float) -> T:
        """The result of `send`, tried again with back-off while the service is away."""
        backoff = self._backoff
        deadline = backoff.clock() + patience_s
        tries = 0
        while True:
            try:
                return send()
            except ApiError as error:
                tries += 1
                pause_s = backoff.pause_s(tries)
                if not self._may_pass(error) or backoff.clock() + pause_s > deadline:
                    raise
            backoff.sleep(pause_s)

    def _once(self, method: str, path: str, request: dict[str, Any]) -> httpx.Response:
        with self._translated():
            response = self._http.request(method, path, **request)
        if response.is_error:
            raise api_error(_problem(response))
        return response

    def _may_pass(self, error: ApiError) -> bool:
        if isinstance(error, UnreachableError):
            return not (self._refused_is_final and isinstance(error, RefusedError))
        return error.status >= 500 or error.status == TOO_MANY or error.code == CONFLICT

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise RefusedError(
                f"nothing answers at {self.url} ({error}); start the service with `cim up`, "
                "or name a running one with --url or CIM_URL"
            ) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(f"the service at {self.url} did not answer in time") from error
        except httpx.TransportError as error:
            raise UnreachableError(f"the connection to {self.url} broke: {error}") from error


def parse(kind: type[T], response: httpx.Response) -> T:
    """The JSON body as `kind`; an `ApiError` of code `bad_answer` when it is something else."""
    try:
        result: T = TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ApiError(
            Problem(
                title="Not an answer of this service",
                status=response.status_code,
                code=BAD_ANSWER,
                detail=f"{response.request.url} sent something unexpected ({place}: {first['msg']}); "
                "is this the address of the service, and of the same version?",
            )
        ) from error
    return result


def checked_url(url: str) -> str:
    """The address without its last slash. Raises ValueError unless it is http(s)://HOST..."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"the service's address {url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"the service's address must look like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _problem(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:  # a proxy's page, or another program on this port
        text = response.text.strip()[:300] or response.reason_phrase
        return Problem(
            title=response.reason_phrase,
            status=response.status_code,
            code=f"http_{response.status_code}",
            detail=f"{response.request.url} answered {response.status_code}: {text}",
        )
