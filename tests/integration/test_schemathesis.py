"""Every operation of the OpenAPI document, with requests drawn from it, at the real API on a real port.

What the document says is true: its status codes, content types and schemas; and nothing ends in 5xx.
Half of the requests name things that exist, and carry the token of the attempt that they speak for.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from service.contracts.tokens import claim_code
from tests.fakes.served import served
from tests.fakes.work_contract import checkpoint, running, success
from tests.fakes.world import SECRET, World, open_world, token_of

DOCUMENT = json.loads((Path(__file__).parents[1] / "golden" / "openapi.json").read_text())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    missing_required_header,
    unsupported_method,
    allow_header_conformance,
]
Case = schemathesis.Case[Any]
every = schemathesis.openapi.from_dict(DOCUMENT)
drawn = schemathesis.openapi.from_dict(
    DOCUMENT, config=schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": False}}})
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A service with a job that is over and one that runs."""

    url: str
    over: str
    runs: str


@pytest.fixture(scope="module")
def target(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("schemathesis")
    database = folder / "cim.db"
    database.write_bytes(migrated_sqlite.read_bytes())
    with beside(lambda ready, stop: serve(f"sqlite+aiosqlite:///{database}", folder, ready, stop)) as made:
        yield made


async def serve(url: str, folder: Path, ready: Callable[[Target], None], stop: asyncio.Event) -> None:
    async with open_world(url, folder) as world:
        over, runs = await running(world, name="over"), await running(world, name="runs")
        await fill(world, over)
        async with served(world.app) as address:
            ready(Target(url=address, over=over, runs=runs))
            await stop.wait()


async def fill(world: World, job_id: str) -> None:
    """Give a job all that a job may have, and end it: a stream of what it says ends too."""
    point = {"key": "loss", "step": 5, "value": 0.5}
    await world.report(job_id, 1, step=5, metrics=[point], files=[world.file(job_id, "samples/step-5.png")])
    await world.tell(job_id, 1, "checkpoints", checkpoint(world, job_id, attempt=1, step=5))
    told = success(world, job_id, metrics={"loss": 0.25})
    assert (await world.tell(job_id, 1, "finish", told)).status_code == 200


@contextmanager
def beside(
    work: Callable[[Callable[[Target], None], asyncio.Event], Coroutine[Any, Any, None]],
) -> Iterator[Target]:
    """Run `work` in an event loop of a thread of its own until the block ends."""
    found: list[Target] = []
    is_ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def ready(target: Target) -> None:
        found.append(target)
        is_ready.set()

    async def run() -> None:
        try:
            await work(ready, stop)
        finally:
            is_ready.set()
            # Streams that ended leave a watcher behind, which would wait for ever.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    is_ready.wait()
    assert found, "the service did not start"
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def bounded(examples: int) -> settings:
    """The same requests in each run."""
    checks = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


@every.exclude(path="/v1/jobs", method="POST").parametrize()
@bounded(20)
@pytest.mark.timeout(300)
def test_operation__does_what_the_document_says(case: Case, target: Target) -> None:
    check(case, target)


# Its body is that of `validate`, whose three thousand boundary cases are enough.
@drawn.include(path="/v1/jobs", method="POST").parametrize()
@bounded(40)
@pytest.mark.timeout(300)
def test_submit__does_what_the_document_says(case: Case, target: Target) -> None:
    check(case, target)


def check(case: Case, target: Target) -> None:
    headers, of_negation = {}, []
    if known(case):
        # What was wrong with the address is right now.
        headers, of_negation = at_home(case, target), [negative_data_rejection, missing_required_header]
    checks = [one for one in CHECKS if one not in of_negation]
    case.call_and_validate(base_url=target.url, checks=checks, headers=headers, timeout=30)


def known(case: Case) -> bool:
    """Whether a request is sent to something that exists: a function of the request, so it is repeatable."""
    return len(json.dumps(case.path_parameters, default=str)) % 2 == 0


def at_home(case: Case, target: Target) -> dict[str, str]:
    """Name a job that is there; the header that opens it."""
    if "ref" in case.path_parameters:
        case.path_parameters["ref"] = target.over
        if "path" in case.path_parameters:
            case.path_parameters["path"] = "samples/step-5.png"
    if "job_id" not in case.path_parameters:
        return {}
    case.path_parameters |= {"job_id": target.runs, "attempt": 1}
    token = token_of(target.runs, 1)
    if case.path.endswith("/claim"):
        token = claim_code(SECRET, target.runs, 1)
    return {"Authorization": f"Bearer {token}"}
