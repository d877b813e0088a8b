"""The edges of HTTP: every error is a problem, nothing is too large, a lost database is said so."""

from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from service.api.deps import Services
from service.api.limits import MAX_BODY_BYTES
from service.contracts.problems import Problem
from service.store.directory import DirectoryStore
from tests.fakes.world import World


def problem(answer: httpx.Response) -> Problem:
    assert answer.headers["content-type"] == "application/problem+json"
    told = Problem.model_validate_json(answer.content)
    assert told.status == answer.status_code
    return told


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/nobody", 404, "not_found"),
        ("GET", "/v1/jobs/nobody/logs?follow=true", 404, "not_found"),
        ("GET", "/v1/jobs/%00", 400, "bad_request"),
        ("GET", "/v1/jobs?q=%00", 400, "bad_request"),
        ("GET", "/v1/jobs?state=asleep", 422, "invalid_request"),
        ("GET", "/v1/jobs?label=team", 422, "invalid_request"),
        ("GET", "/v1/jobs?cursor=bm8=", 422, "invalid_request"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_request"),
        ("POST", "/v1/jobs/nobody/cancel", 404, "not_found"),
    ],
)
async def test_errors__are_problems(world: World, method: str, path: str, status: int, code: str) -> None:
    told = problem(await world.client.request(method, path))
    assert (told.status, told.code) == (status, code)
    assert told.detail


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"", "required"),
        (b"[" * 100_000, ""),
        (b"[]", "1 to 100"),
        (b"[" + b"{}," * 100 + b"{}]", "1 to 100"),
        (b"\xff\xfe", ""),
    ],
)
async def test_submit__a_body_that_is_no_spec(world: World, body: bytes, word: str) -> None:
    headers = {"Content-Type": "application/json"}
    told = problem(await world.client.post("/v1/jobs", content=body, headers=headers))
    assert told.status in (400, 422)
    assert word in told.detail


async def test_submit__yaml_is_told_where_to_go(world: World) -> None:
    answer = await world.client.post("/v1/jobs", content=b"kind: tokenizer")
    assert "cim submit" in problem(answer).errors[0].message


async def test_limits__a_large_body_is_refused_unread(world: World) -> None:
    answer = await world.client.post("/v1/jobs", content=b" " * (MAX_BODY_BYTES + 1))
    assert problem(answer).status == 413


async def test_limits__a_body_of_unknown_length_is_counted(world: World) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY_BYTES:
            sent += 1 << 16
            yield b" " * (1 << 16)

    answer = await world.client.post(
        "/v1/jobs", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert problem(answer).status == 413
    assert sent <= MAX_BODY_BYTES + (1 << 17)


async def test_database__its_absence_is_503_and_not_our_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused by 10.0.0.1"))

    monkeypatch.setattr("service.db.queries.newest", refuse)
    told = problem(await world.client.get("/v1/jobs"))
    assert (told.status, told.code) == (503, "database_unavailable")
    assert "10.0.0.1" not in told.detail


async def test_bug__is_500_without_details(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("service.db.queries.newest", fail)
    answer = await world.client.get("/v1/jobs")
    assert (problem(answer).code, "secret" in answer.text) == ("internal", False)


class PresigningStore(DirectoryStore):
    """A folder that behaves like a bucket with public addresses."""

    def presign(self, key: str, *, expires_s: int = 3600) -> str | None:
        return f"https://bucket.test/{key}?expires={expires_s}"


async def test_artifacts__a_bucket_is_redirected_to(world: World) -> None:
    job = (await world.submit(world.tokenizer()))[0]
    await world.launch(job["id"])
    await world.report(job["id"], 1, files=[world.file(job["id"], "a.bin", b"bytes")])
    services: Services = world.app.state.services
    assert isinstance(world.store, DirectoryStore)
    world.app.state.services = Services(
        settings=services.settings,
        sessions=services.sessions,
        store=PresigningStore(world.images.parent / "store"),
        costs=services.costs,
        looks=services.looks,
        clock=services.clock,
    )
    answer = await world.client.get(f"/v1/jobs/{job['id']}/artifacts/a.bin")
    assert answer.status_code == 307
    assert answer.headers["location"].startswith(f"https://bucket.test/jobs/{job['id']}/a.bin")
    direct = await world.client.get(f"/v1/jobs/{job['id']}/artifacts/a.bin?redirect=false")
    assert (direct.status_code, direct.content) == (200, b"bytes")


async def test_validate__stores_nothing_and_tells_what_it_will_take(world: World) -> None:
    documents = [world.tokenizer(), world.pretrain(), world.pretrain("other", source="fake")]
    answer = await world.client.post("/v1/jobs/validate", json=documents)
    assert answer.status_code == 200
    told = answer.json()
    assert told["resolved"][1]["model"]["tokenizer"]["source"] == "job:tok"
    assert [estimate["name"] for estimate in told["estimate"]] == ["tok", "enc", "other"]
    assert any("fake" in warning for warning in told["warnings"])
    assert (await world.client.get("/v1/jobs")).json()["jobs"] == []
    refused = await world.client.post("/v1/jobs/validate", json=world.pretrain())
    assert refused.status_code == 422
    assert len(world.costs.questions) == 3


async def test_mlflow__the_page_of_the_run_is_linked(world: World) -> None:
    job = (await world.submit(world.tokenizer()))[0]
    assert job["mlflow_url"] is None
    async with world.sessions.begin() as session:
        row = await session.get_one(type(await world.row(job["id"])), job["id"])
        row.mlflow_run_id = "abc"
    assert (await world.show("tok"))["mlflow_url"] == "http://mlflow.test/#/runs/abc"
