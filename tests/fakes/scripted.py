"""A service that answers from a script, and a clock that moves only when someone sleeps."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import httpx

from service.client.http import Backoff
from service.contracts.jobs import Desired, JobState, JobView, Progress
from service.contracts.problems import FieldProblem, Problem

Answer = httpx.Response | BaseException
JOB_ID = "0123456789abcdef"
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.pauses.append(seconds)
        self.now += seconds

    def backoff(self) -> Backoff:
        """Back-off on this clock, without chance."""
        return Backoff(clock=lambda: self.now, sleep=self.sleep, jitter=lambda: 0.0)


class Server:
    """Gives its answers in turn, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def calls(self) -> list[str]:
        """`METHOD PATH?QUERY` of each request."""
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]


def problem(
    status: int, code: str, *, detail: str = "why", errors: Sequence[FieldProblem] = ()
) -> httpx.Response:
    """An error answer."""
    body = Problem(title="t", status=status, code=code, detail=detail, errors=list(errors))
    return httpx.Response(
        status, content=body.model_dump_json(), headers={"content-type": "application/problem+json"}
    )


def ok(body: Any) -> httpx.Response:
    """A JSON answer; models and lists of them are dumped."""
    if isinstance(body, list):
        return httpx.Response(200, json=[_dumped(item) for item in body])
    return httpx.Response(200, json=_dumped(body))


def job(state: JobState = JobState.RUNNING, *, step: int = 0, **changes: Any) -> JobView:
    """A job of 100 steps."""
    values: dict[str, Any] = {
        "id": JOB_ID,
        "name": "street",
        "kind": "pretrain",
        "state": state,
        "desired": Desired.RUN,
        "reason": "as told",
        "priority": 50,
        "labels": {},
        "spec": {},
        "resolved": {},
        "created_at": CREATED,
        "progress": Progress(step=step, total_steps=100),
    }
    return JobView(**(values | changes))


def _dumped(item: Any) -> Any:
    return item.model_dump(mode="json") if hasattr(item, "model_dump") else item
