"""Ray's odd answers; a real head is asked in the integration tier."""

import asyncio
import json
import subprocess
import tracemalloc
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from service.dispatch import ray_launcher
from service.dispatch.launcher import LauncherUnavailableError, Submission
from service.dispatch.ray_launcher import RayLauncher
from service.domain.decide import ClusterState
from service.domain.queueing import Needs

JOB = Submission(id="cim-a-1", command=["python", "-c", "print('a b; $HOME')"], env={"CIM_CLAIM_CODE": "t"})
KNOWN = httpx.Response(200, json={"status": "RUNNING", "message": None, "driver_exit_code": None})
UNKNOWN = httpx.Response(404, text="Job cim-a-1 does not exist")
Handler = Callable[[httpx.Request], httpx.Response]


def ray(handler: Handler, *, token: str | None = "secret") -> RayLauncher:
    return RayLauncher("http://ray:8265", token=token, transport=httpx.MockTransport(handler))


def answers(post: httpx.Response | Exception, get: httpx.Response) -> Handler:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return get
        if isinstance(post, Exception):
            raise post
        return post

    return handle


def words(line: str) -> list[str]:
    """How a real shell, which Ray hands the entrypoint to, takes a line apart."""
    printed = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True, check=True)
    return printed.stdout.splitlines()


async def test_submit__sends_a_quoted_command_the_token_and_no_cpus() -> None:
    sent: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={"submission_id": "cim-a-1"})

    await ray(handle).submit(JOB)
    (request,) = sent
    body = json.loads(request.content)
    assert request.headers["authorization"] == "Bearer secret"
    assert body["submission_id"] == "cim-a-1"
    assert body["entrypoint_num_cpus"] == 0
    assert body["runtime_env"] == {"env_vars": {"CIM_CLAIM_CODE": "t"}}
    assert words(body["entrypoint"]) == list(JOB.command)


@pytest.mark.parametrize(
    "post",
    [
        httpx.Response(500, text="ValueError: Job with submission_id cim-a-1 already exists."),
        httpx.ReadTimeout("lost"),
    ],
    ids=["refused duplicate", "lost reply"],
)
async def test_submit__what_ray_knows_is_adopted(post: httpx.Response | Exception) -> None:
    await ray(answers(post, KNOWN)).submit(JOB)


@pytest.mark.parametrize(
    "post",
    [httpx.Response(500, text="no agent available\n.\n"), httpx.ConnectError("refused")],
    ids=["500", "down"],
)
async def test_submit__what_ray_does_not_know_was_not_taken(post: httpx.Response | Exception) -> None:
    with pytest.raises(
        LauncherUnavailableError, match=r"did not take cim-a-1: .*(no agent available|refused)"
    ):
        await ray(answers(post, UNKNOWN)).submit(JOB)


async def test_status__unknown_is_none_but_an_outage_is_not() -> None:
    assert await ray(answers(UNKNOWN, UNKNOWN)).status("cim-a-1") is None
    for bad in (
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"status": "NEW"}),
    ):
        with pytest.raises(LauncherUnavailableError):
            await ray(answers(bad, bad)).status("cim-a-1")


async def test_status__gives_the_first_line_and_the_exit_code() -> None:
    body = {"status": "FAILED", "message": "exit code 3, last logs:\nmuch\nmore", "driver_exit_code": 3}
    job = await ray(answers(UNKNOWN, httpx.Response(200, json=body))).status("cim-a-1")
    assert job is not None
    assert (job.state, job.message, job.exit_code) == (ClusterState.FAILED, "exit code 3, last logs:", 3)
    assert job.state.ended


async def test_unauthorised__names_the_setting() -> None:
    with pytest.raises(LauncherUnavailableError, match="CIM_RAY_TOKEN"):
        await ray(answers(UNKNOWN, httpx.Response(401))).status("cim-a-1")


async def test_stop__an_outage_is_told() -> None:
    await ray(answers(UNKNOWN, UNKNOWN)).stop("cim-a-1")
    with pytest.raises(LauncherUnavailableError, match="status 503"):
        await ray(answers(httpx.Response(503, text="busy"), UNKNOWN)).stop("cim-a-1")


def driver_log(*parts: bytes) -> Handler:
    """A log that Ray sends in these parts."""

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return answers_log(httpx.Response(200, content=body()))


def answers_log(log: httpx.Response | Exception) -> Handler:
    """A job that Ray knows, and what it says when it is asked for the log."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/jobs/cim-a-1":
            return httpx.Response(200, json={"status": "FAILED", "driver_node_id": "n1"})
        assert request.url.path == "/api/v0/logs/file"
        assert dict(request.url.params) == {"node_id": "n1", "submission_id": "cim-a-1", "lines": "3"}
        if isinstance(log, Exception):
            raise log
        return log

    return handle


async def test_log_tail__is_the_last_lines() -> None:
    log = driver_log(b"one\ntw", b"o\nthr\xc3", b"\xa9\xff\nfour\n")
    assert await ray(log).log_tail("cim-a-1", max_lines=3) == ["two", "thr\xe9\ufffd", "four"]
    assert await ray(driver_log()).log_tail("cim-a-1", max_lines=3) == []


async def test_log_tail__of_a_flood_is_short_and_takes_little_memory() -> None:
    line = b"x" * 2**20
    log = driver_log(*[line] * 64, b"\nthe last words\n")
    tracemalloc.start()
    tail = await ray(log).log_tail("cim-a-1", max_lines=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tail[-1] == "the last words"
    assert tail[0].startswith("[cut] xxx")
    assert sum(map(len, tail)) <= 2**16 + len("[cut] ")
    assert peak < 8 * 2**20


async def test_log_tail__of_gigabytes_or_of_a_line_without_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 2**20
            yield b"x" * 2**20

    async def silent() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.Event().wait()

    tail = await ray(answers_log(httpx.Response(200, content=endless()))).log_tail("cim-a-1", max_lines=3)
    assert tail[0].startswith("[cut] xxx")
    assert taken < 2**29
    monkeypatch.setattr(ray_launcher, "_TAIL_LIMIT_S", 0.05)
    assert await ray(answers_log(httpx.Response(200, content=silent()))).log_tail("cim-a-1", max_lines=3) == [
        "one"
    ]


@pytest.mark.parametrize("status", [404, 429, 500, 503])
async def test_log_tail__what_ray_cannot_read_holds_nothing_up(status: int) -> None:
    """Its node may be gone for good: the job must be judged without its last words."""
    log = answers_log(httpx.Response(status, text="Agent is unavailable"))
    assert await ray(log).log_tail("cim-a-1", max_lines=3) == []


async def test_log_tail__of_a_job_that_is_unknown_or_has_no_node_yet_is_empty() -> None:
    for answer in (UNKNOWN, httpx.Response(200, json={"status": "FAILED", "driver_node_id": None})):
        assert await ray(answers(answer, answer)).log_tail("cim-a-1", max_lines=3) == []


async def test_log_tail__cut_off_on_the_way_gives_what_came() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one\ntwo\n"
        raise httpx.RemoteProtocolError("peer closed connection")

    launcher = ray(answers_log(httpx.Response(200, content=body())))
    assert await launcher.log_tail("cim-a-1", max_lines=3) == ["one", "two"]


async def test_log_tail__nobody_there_is_an_outage() -> None:
    with pytest.raises(LauncherUnavailableError, match="refused"):
        await ray(answers_log(httpx.ConnectError("refused"))).log_tail("cim-a-1", max_lines=3)
    with pytest.raises(LauncherUnavailableError, match="CIM_RAY_TOKEN"):
        await ray(answers(UNKNOWN, httpx.Response(401))).log_tail("cim-a-1", max_lines=3)


async def test_capacity__sums_living_nodes() -> None:
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 2.0}},
        {"state": "ALIVE", "resources_total": {"CPU": 4.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}},
    ]
    body = {"data": {"result": {"result": nodes}}}
    assert await ray(answers(UNKNOWN, httpx.Response(200, json=body))).capacity() == Needs(cpus=12, gpus=2)
    with pytest.raises(LauncherUnavailableError, match="list of nodes"):
        await ray(answers(UNKNOWN, httpx.Response(200, json={"data": {}}))).capacity()
