"""The workers' client against a scripted server and a clock that only moves when it sleeps."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.client.errors import ApiError, RefusedError, StaleAttempt, UnreachableError
from service.client.http import Backoff
from service.client.work import PATIENCE_S, WorkClient
from service.contracts.jobs import FileEntry, MetricPoint, Progress
from service.contracts.work import Assignment, Checkpoint, Finish, Report, StoreAddress
from tests.fakes.scripted import Answer, Clock, Server, problem

ASSIGNMENT = Assignment(
    job_id="ab" * 8, attempt=2, spec={"kind": "x"}, inputs={}, store=StoreAddress(url="/objects")
)
GO_ON = httpx.Response(200, json={"directive": "continue"})


def client_of(server: Server, clock: Clock) -> WorkClient:
    transport = httpx.MockTransport(server)
    url = "http://service:1/"
    return WorkClient(url, "ab" * 8, 2, "secret", backoff=clock.backoff(), transport=transport)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_claim__shows_the_code_and_keeps_the_token_to_itself(clock: Clock) -> None:
    server = Server(problem(503, "database_unavailable"), httpx.Response(200, json={"taken": True}), GO_ON)
    with client_of(server, clock) as client:
        client.claim("the code")
        client.report(Report(progress=Progress()))
    *claims, report = server.requests
    assert {(r.method, r.url.path) for r in claims} == {("POST", f"/v1/attempts/{'ab' * 8}/2/claim")}
    assert {r.headers["authorization"] for r in claims} == {"Bearer the code"}
    digest = hashlib.sha256(b"secret").hexdigest()
    assert [json.loads(r.content) for r in claims] == [{"token_hash": digest}] * 2
    assert report.headers["authorization"] == "Bearer secret"


def test_calls__go_to_the_attempt_with_its_token(clock: Clock) -> None:
    server = Server(
        httpx.Response(200, content=ASSIGNMENT.model_dump_json()),
        GO_ON,
        httpx.Response(200),
        httpx.Response(200),
    )
    entry = FileEntry(path="encoder/config.json", size=2, sha256="0" * 64)
    report = Report(progress=Progress(step=3), metrics=[MetricPoint(step=3, key="loss", value=0.5)])
    with client_of(server, clock) as client:
        assert client.assignment() == ASSIGNMENT
        assert client.report(report).directive == "continue"
        client.commit_checkpoint(Checkpoint(step=3, prefix="attempts/2/checkpoints/step-3", files=[entry]))
        client.finish(Finish(outcome="succeeded", step=3))

    base = f"http://service:1/v1/attempts/{'ab' * 8}/2"
    assert [(r.method, str(r.url)) for r in server.requests] == [
        ("GET", base),
        ("POST", f"{base}/report"),
        ("POST", f"{base}/checkpoints"),
        ("POST", f"{base}/finish"),
    ]
    assert {r.headers["authorization"] for r in server.requests} == {"Bearer secret"}
    bodies: list[Any] = [json.loads(r.content) for r in server.requests[1:]]
    assert bodies[0]["metrics"] == [{"step": 3, "key": "loss", "value": 0.5}]
    assert bodies[1]["files"] == [{"path": "encoder/config.json", "size": 2, "sha256": "0" * 64}]
    assert bodies[2]["outcome"] == "succeeded"


def test_commits__wait_longer_for_an_answer_the_more_bytes_the_service_has_to_read(clock: Clock) -> None:
    server = Server(GO_ON)
    files = [FileEntry(path=f"encoder/{n}", size=500_000_000, sha256="0" * 64) for n in range(4)]
    with client_of(server, clock) as client:
        client.report(Report(progress=Progress()))
        client.commit_checkpoint(Checkpoint(step=3, prefix="p", files=files))
        client.finish(Finish(outcome="succeeded", step=3, files=files[:1]))
    waits = [request.extensions["timeout"] for request in server.requests]
    assert [wait["read"] for wait in waits] == [30, 30 + 2_000_000_000 / 20e6, 30 + 500_000_000 / 20e6]
    assert {wait["connect"] for wait in waits} == {5}


PASSING: list[Answer] = [
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("slow"),
    httpx.RemoteProtocolError("cut"),
    httpx.Response(500, text="oops"),
    problem(503, "store_unavailable"),
    problem(429, "slow_down"),
    problem(409, "conflict"),
]


@pytest.mark.parametrize("passing", PASSING, ids=lambda answer: str(getattr(answer, "status_code", answer)))
def test_retry__what_may_pass_is_tried_again(clock: Clock, passing: Answer) -> None:
    server = Server(passing, passing, GO_ON)
    assert client_of(server, clock).report(Report(progress=Progress())).directive == "continue"
    assert clock.pauses == [0.5, 1.0]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
def test_retry__a_refusal_is_told_at_once(clock: Clock, status: int) -> None:
    server = Server(problem(status, "some_code", detail="because"))
    with pytest.raises(ApiError, match="because") as raised:
        client_of(server, clock).report(Report(progress=Progress()))
    assert (raised.value.status, raised.value.code) == (status, "some_code")
    assert not isinstance(raised.value, StaleAttempt)
    assert len(server.requests) == 1


def test_retry__a_stale_attempt_has_a_class_of_its_own(clock: Clock) -> None:
    server = Server(problem(409, "stale_attempt"))
    calls: list[Callable[[WorkClient], object]] = [
        lambda client: client.report(Report(progress=Progress())),
        lambda client: client.commit_checkpoint(Checkpoint(step=0, prefix="p", files=[])),
        lambda client: client.finish(Finish(outcome="stopped", step=0)),
        lambda client: client.assignment(),
    ]
    for call in calls:
        with pytest.raises(StaleAttempt):
            call(client_of(server, clock))
    assert clock.pauses == []


def test_retry__pauses_double_up_to_the_longest_and_are_shortened_at_random(clock: Clock) -> None:
    with pytest.raises(RefusedError):
        client_of(Server(httpx.ConnectError("no")), clock).report(Report(progress=Progress()), patience_s=60)
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert [Backoff(jitter=lambda: 0.999).pause_s(tries) for tries in (1, 5)] == pytest.approx(
        [0.25, 4.0], rel=0.01
    )


@pytest.mark.parametrize(("patience_s", "num_requests"), [(0.0, 1), (0.4, 1), (0.5, 2), (1.5, 3)])
def test_retry__no_pause_goes_beyond_the_deadline(clock: Clock, patience_s: float, num_requests: int) -> None:
    server = Server(httpx.ReadTimeout("slow"))
    with pytest.raises(UnreachableError, match="did not answer in time"):
        client_of(server, clock).report(Report(progress=Progress()), patience_s=patience_s)
    assert len(server.requests) == num_requests
    assert clock.now <= patience_s


def test_retry__the_default_patience_is_a_quarter_of_an_hour(clock: Clock) -> None:
    server = Server(problem(503, "unavailable"))
    with pytest.raises(ApiError) as raised:
        client_of(server, clock).finish(Finish(outcome="stopped", step=1))
    assert raised.value.status == 503
    assert PATIENCE_S - 15 < clock.now <= PATIENCE_S == 900


ODD = [
    httpx.Response(200, text="<html>"),
    httpx.Response(200, json={"directive": "dance"}),
    httpx.Response(200, json=[]),
]


@pytest.mark.parametrize("answer", ODD, ids=["html", "wrong_value", "wrong_shape"])
def test_answers__that_make_no_sense_are_an_error(clock: Clock, answer: httpx.Response) -> None:
    with pytest.raises(ApiError) as raised:
        client_of(Server(answer), clock).report(Report(progress=Progress()))
    assert raised.value.code == "bad_answer"
