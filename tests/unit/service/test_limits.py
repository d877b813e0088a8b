"""Whatever is too large, too many or too deep ends in a problem of 4xx, before it costs much."""

import json
from typing import Any

import httpx
import pytest

from service.api.limits import MAX_ADDRESS_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, MAX_REPORT_BYTES
from service.contracts.parsing import parse_all
from service.contracts.problems import Problem
from service.contracts.specs import MOST_LABELS
from service.contracts.work import MOST_POINTS
from service.errors import InvalidSpecError
from tests.fakes.work_contract import running, success
from tests.fakes.world import World
from tests.unit.service.test_parsing import pretrain

LONG = "9" * 5000  # digits: more than int() takes


def problem(answer: httpx.Response, *statuses: int) -> Problem:
    assert answer.status_code in statuses, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    return Problem.model_validate_json(answer.content)


def nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


@pytest.mark.parametrize(
    ("num", "size", "status"),
    [(MAX_HEADERS - 10, 10, 200), (MAX_HEADERS + 1, 1, 431), (1, MAX_HEADER_BYTES, 431), (5000, 10, 431)],
)
async def test_headers__are_counted(world: World, num: int, size: int, status: int) -> None:
    answer = await world.client.get("/healthz", headers={f"X-{n}": "a" * size for n in range(num)})
    assert answer.status_code == status
    if status == 431:
        assert str(MAX_HEADERS) in problem(answer, 431).detail


@pytest.mark.parametrize(
    "address", ["/v1/jobs/" + "a" * MAX_ADDRESS_BYTES, "/v1/jobs?q=" + "a" * MAX_ADDRESS_BYTES]
)
async def test_address__is_measured(world: World, address: str) -> None:
    assert str(MAX_ADDRESS_BYTES) in problem(await world.client.get(address), 414).detail


@pytest.mark.parametrize("num_bytes", [MAX_REPORT_BYTES + 1, 16 << 20])
async def test_report__of_megabytes_is_refused_before_it_is_read(world: World, num_bytes: int) -> None:
    job_id = await running(world)
    other = await running(world)
    answer = await world.report(job_id, 1, plan={"padding": "x" * num_bytes})
    assert str(MAX_REPORT_BYTES) in problem(answer, 413).detail
    assert (await world.report(other, 1, step=7)).status_code == 200
    assert (await world.report(job_id, 1, step=8)).status_code == 200


async def test_report__holds_so_many_points_and_no_more(world: World) -> None:
    job_id = await running(world)
    points = [{"step": n, "key": "k", "value": 1.0} for n in range(MOST_POINTS + 1)]
    assert (await world.report(job_id, 1, metrics=points[1:])).status_code == 200
    answer = await world.report(job_id, 1, metrics=points)
    assert [error.path for error in problem(answer, 422).errors] == ["metrics"]


@pytest.mark.parametrize("depth", [33, 500, 100_000])
async def test_nesting__deep_json_is_refused(world: World, depth: int) -> None:
    job_id = await running(world)
    json_headers = {"Content-Type": "application/json"}
    for method, address, body in (
        ("POST", "/v1/jobs", nested(depth)),
        ("POST", "/v1/jobs", "[" * depth + "]" * depth),
        ("POST", "/v1/jobs", json.dumps(world.tokenizer())[:-1] + f', "model": {nested(depth)}}}'),
        ("POST", "/v1/jobs/validate", nested(depth)),
        ("PATCH", f"/v1/jobs/{job_id}", nested(depth)),
        ("PATCH", f"/v1/jobs/{job_id}", f'{{"labels": {nested(depth)}}}'),
    ):
        answer = await world.client.request(method, address, content=body, headers=json_headers)
        assert len(problem(answer, 400, 422).detail) < 20_000
    for what in ("report", "checkpoints", "finish"):
        token = (await world.tell(job_id, 1, what, {})).request.headers["Authorization"]
        for body in (nested(depth), f'{{"progress": {{}}, "plan": {nested(depth)}}}'):
            headers = {**json_headers, "Authorization": token}
            answer = await world.client.post(f"/v1/attempts/{job_id}/1/{what}", content=body, headers=headers)
            problem(answer, 400, 422)
    assert (await world.show(job_id))["state"] == "running"


async def test_labels__are_counted(world: World) -> None:
    labels = {f"k{n}": "v" for n in range(MOST_LABELS + 1)}
    for method, address, body in (
        ("POST", "/v1/jobs", world.tokenizer(labels=labels)),
        ("PATCH", "/v1/jobs/tok", {"labels": labels}),
    ):
        assert str(MOST_LABELS) in problem(await world.client.request(method, address, json=body), 422).detail
        labels.pop("k0")
        answer = await world.client.request(method, address, json=body)
        assert answer.status_code in (200, 201), answer.text
        labels["k0"] = "v"


@pytest.mark.parametrize(
    "changes",
    [
        {f"key{n}": 1 for n in range(60_000)},
        {"training": {f"epochs{n}": 1 for n in range(60_000)}},
        {"data": [1] * 200_000},
        {"labels": {f"k{n}": "v" for n in range(50_000)}},
        {"x" * 500_000: 1},
        {"name": "x" * 500_000},
    ],
    ids=["unknown_keys", "near_keys", "list", "labels", "long_key", "long_name"],
)
async def test_spec__how_much_it_holds_is_bounded(world: World, changes: dict[str, Any]) -> None:
    told = problem(await world.client.post("/v1/jobs", json={**world.tokenizer(), **changes}), 422)
    assert len(told.errors) == 1, "one sentence, not one for each of what is too much"
    assert (await world.client.get("/v1/jobs")).json()["jobs"] == []


def test_specs__after_enough_mistakes_the_rest_is_not_judged() -> None:
    wrong = pretrain(**{f"key{n}": 1 for n in range(90)})
    with pytest.raises(InvalidSpecError) as caught:
        parse_all([{**wrong, "name": f"n{n}"} for n in range(50)])
    assert {error.path.partition(".")[0] for error in caught.value.errors} == {"[0]", "[1]", "[2]"}
    assert len(caught.value.errors) == 270


async def test_specs__thousands_are_refused_at_once(world: World) -> None:
    told = problem(await world.client.post("/v1/jobs", json=[{"kind": "tokenizer"}] * 20_000), 422)
    assert "1 to 100" in told.detail
    assert len(told.errors) == 1


@pytest.mark.parametrize("name", ["label", "kind", "state"])
async def test_query__lists_are_counted(world: World, name: str) -> None:
    value = {"label": "a=b", "kind": "x", "state": "queued"}[name]
    problem(await world.client.get("/v1/jobs?" + "&".join([f"{name}={value}"] * 17)), 422)
    assert (await world.client.get("/v1/jobs?" + "&".join([f"{name}={value}"] * 16))).status_code == 200


@pytest.mark.parametrize(
    "text", ["\xb2", LONG, "-1", "9" * 19, "99999999999999999999", "", "1.5", "0x1", "\xff"]
)
async def test_numbers__in_headers_that_are_none_mean_the_beginning(world: World, text: str) -> None:
    await world.submit(world.tokenizer())
    await world.client.post("/v1/jobs/tok/cancel")
    for address in ("/v1/jobs/tok/events?follow=true", "/v1/jobs/tok/logs?follow=true"):
        answer = await world.client.get(address, headers={b"Last-Event-ID": text.encode("latin-1")})
        assert answer.status_code == 200
        assert "event: end" in answer.text


@pytest.mark.parametrize(
    "wanted", [f"bytes={LONG}-", f"bytes=-{LONG}", f"bytes=0-{LONG}", "bytes=\xb2-", "bytes=x"]
)
async def test_numbers__in_a_range_that_are_none_mean_the_whole_file(world: World, wanted: str) -> None:
    job_id = await running(world)
    await world.report(job_id, 1, files=[world.file(job_id, "a.bin", b"0123")])
    headers = {b"Range": wanted.encode("latin-1")}
    answer = await world.client.get(f"/v1/jobs/{job_id}/artifacts/a.bin", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"0123")


@pytest.mark.parametrize("number", [2**63, 2**200, -1, 10**400])
async def test_numbers__beyond_those_of_a_database_are_refused(world: World, number: int) -> None:
    job_id = await running(world)
    entry = {"path": "a", "size": number, "sha256": "0" * 64}
    point = {"key": "loss", "step": number, "value": 1.0}
    for what, body in (
        ("report", {"progress": {"step": number}}),
        ("report", {"progress": {"total_steps": number}}),
        ("report", {"progress": {}, "metrics": [point]}),
        ("report", {"progress": {}, "files": [entry]}),
        ("checkpoints", {"step": number, "prefix": "attempts/1/x", "files": []}),
        ("finish", success(world, job_id, step=number)),
        ("finish", success(world, job_id, total_steps=number)),
    ):
        problem(await world.tell(job_id, 1, what, body), 400, 422)
    for address in (f"/v1/jobs/{job_id}/metrics?after_step={number - 2}", f"/v1/jobs?limit={number}"):
        problem(await world.client.get(address), 422)
    problem(await world.client.get(f"/v1/attempts/{job_id}/{number}"), 401, 422)


async def test_length__that_is_no_number_or_a_lie_is_answered(world: World) -> None:
    for length in (LONG, "-1", "abc", "99999999999999999999"):
        headers = {"Content-Length": length, "Content-Type": "application/json"}
        answer = await world.client.post("/v1/jobs", content=b"{}", headers=headers)
        problem(answer, 413, 422)
