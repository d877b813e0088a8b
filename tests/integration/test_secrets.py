"""A job from submit to result, and one that fails, with secrets that are known: nowhere do they come out.

Everything is real but Ray and MLflow: the API on a port, the dispatcher's passes, the worker's driver.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.dispatch.forwarder import Forwarder
from service.dispatch.loop import rules
from service.dispatch.reconciler import Reconciler
from service.domain.decide import ClusterState
from service.domain.names import submission_id
from service.settings import Settings
from tests.fakes.control_plane import lease_of
from tests.fakes.launcher import FakeLauncher
from tests.fakes.served import served
from tests.fakes.tracker import FakeTracker
from tests.fakes.world import SECRET, World
from workers import driver
from workers.attempt import Outcome, Work
from workers.failures import ExitCode
from workers.settings import WorkerSettings
from workers.storage import JobStore

AWS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETSECRET0001",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+SECRET0002",
    "AWS_SESSION_TOKEN": "aws-session-SECRET0003",
}
RAY_TOKEN = "ray-token-SECRET0004"
LABEL = "https://me:label-SECRET0009@host/?token=label-SECRET0010"
WEB = "https://me:web-SECRET0005@example.org/x?sig=web-SECRET0006"


@dataclass
class Everything:
    """All that anyone can read afterwards, by where it is read."""

    world: World
    launcher: FakeLauncher
    tracker: FakeTracker
    reconciler: Reconciler
    forwarder: Forwarder
    url: str
    folder: Path
    tokens: list[str] = field(default_factory=list)

    async def run(self, spec: dict[str, Any], ranks: Any, monkeypatch: pytest.MonkeyPatch) -> ExitCode:
        """One attempt of a new job, told to MLflow too."""
        (job,) = await self.world.submit(spec)
        await self.reconciler.run_once()
        sent = self.launcher.submissions[submission_id(job["id"], 1)]
        url, attempt = sent.command[-3], sent.command[-1]
        settings = WorkerSettings.read(url, attempt, sent.env)
        self.tokens += [settings.token, *sent.env.values()]
        monkeypatch.setattr(driver, "connect", lambda _: None)
        monkeypatch.setattr(driver, "_train", ranks)
        code = await asyncio.to_thread(driver.run, settings)
        await self.reconciler.run_once()
        await self.forwarder.run_once()
        return code

    async def read(self) -> dict[str, str]:
        """Text of every answer, every object of the store, and all that MLflow has."""
        client = self.world.client
        found = {"mlflow": repr(self.tracker.runs), "settings": repr(self.world.app.state.services)}
        for job in (await client.get("/v1/jobs")).json()["jobs"]:
            for part in ("", "/events", "/logs", "/metrics", "/artifacts"):
                address = f"/v1/jobs/{job['id']}{part}"
                found[address] = (await client.get(address)).text
        for path in (self.folder / "store").rglob("*"):
            if path.is_file():
                found[str(path)] = path.read_bytes().decode(errors="replace")
        return found


@pytest.fixture
async def everything(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Everything]:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(world.images / f"{number}.png")
    (world.images / "one.png").unlink()
    async with served(world.app) as url:
        settings: Settings = world.app.state.services.settings
        launcher, tracker = FakeLauncher(), FakeTracker()
        told = rules(settings.model_copy(update={"public_url": url}))
        lease = await lease_of(world.sessions)
        reconciler = Reconciler(
            world.sessions,
            launcher,
            world.store,
            lease=lease,
            rules=told,
            clock=world.clock,
            monotonic=lambda: world.clock.now.timestamp(),
        )
        forwarder = Forwarder(world.sessions, tracker, world.store, lease=lease, public_url=url)
        yield Everything(world, launcher, tracker, reconciler, forwarder, url, tmp_path)


def shout(work: Work, store: JobStore) -> list[str]:
    """A library that logs all that it knows."""
    settings = work.attempt.settings
    known = [settings.token, settings.code, *AWS.values(), WEB]
    for level in (logging.INFO, logging.ERROR):
        logging.getLogger("workers.library").log(level, "shouting %s", known)
    logging.getLogger("library").error("shouting %s", " ".join(known))
    return known


async def test_secrets__come_out_nowhere(
    everything: Everything, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def succeed(work: Work, store: JobStore) -> Outcome:
        shout(work, store)
        files = [store.put_bytes(path, b"{}") for path in ("tokenizer/config.json", "result.json")]
        return Outcome(stopped=False, step=10, total_steps=10, metrics={"loss": 1.0}, files=files)

    def fail(work: Work, store: JobStore) -> Outcome:
        raise RuntimeError(f"the store refused {' '.join(shout(work, store))}")

    caplog.set_level(logging.INFO)
    world = everything.world
    assert await everything.run(world.tokenizer("good"), succeed, monkeypatch) is ExitCode.DONE
    assert await everything.run(world.tokenizer("bad"), fail, monkeypatch) is ExitCode.INFRASTRUCTURE
    lost = (await world.submit(world.tokenizer("lost")))[0]["id"]
    await everything.reconciler.run_once()
    everything.launcher.end(submission_id(lost, 1), ClusterState.FAILED, log=f"cannot read {WEB}")
    await everything.reconciler.run_once()
    world.clock.now += timedelta(seconds=10)
    await everything.reconciler.run_once()
    refused = [
        (await world.client.post("/v1/jobs", json=world.tokenizer("x", data={"uri": WEB}))).text,
        (await world.client.post("/v1/jobs", json=world.tokenizer("x", labels={"src": LABEL}))).text,
        (await world.client.patch("/v1/jobs/good", json={"labels": {"src": LABEL}})).text,
        (await world.client.patch("/v1/jobs/good", json={"name": AWS["AWS_ACCESS_KEY_ID"]})).text,
        (await world.tell(lost, 1, "report", {"progress": {}}, token="guessed-SECRET0007")).text,
        (await world.claim(lost, 1, code="guessed-SECRET0008")).text,
    ]
    found = await everything.read()
    sources = {**found, "refused": repr(refused), "service log": service_log(caplog)}
    assert all('"status":4' in text for text in refused)
    assert (await world.show("good"))["state"] == "succeeded"
    assert "the store refused" in (await world.show("bad"))["attempts"][0]["message"]
    assert "its last lines: cannot read https://***" in (await world.show("lost"))["reason"]
    assert "shouting" in "".join(text for name, text in found.items() if name.endswith("/logs"))
    assert "submitted" in sources["service log"]
    secrets = [SECRET, RAY_TOKEN, *everything.tokens, *AWS.values(), "SECRET000"]
    for name, text in sources.items():
        for secret in secrets:
            assert secret not in text, f"{secret} stands in {name}"
            assert json.dumps(secret)[1:-1] not in text, f"{secret} stands in {name}"


def service_log(caplog: pytest.LogCaptureFixture) -> str:
    """What the service itself has logged: the workers' lines are in the store, judged there."""
    ours = [
        record for record in caplog.records if record.name.startswith(("service", "uvicorn", "sqlalchemy"))
    ]
    return "\n".join(logging.Formatter().format(record) for record in ours)
