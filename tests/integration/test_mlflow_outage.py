"""An hour without MLflow: afterwards every curve is complete, without doubles, and every state is right."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.contracts.jobs import JobState as S
from service.contracts.jobs import MetricPoint, Progress
from service.contracts.work import Report
from service.dispatch.forwarder import Forwarder
from service.dispatch.mlflow_tracker import MlflowTracker
from service.domain.wishes import Verb
from service.jobs import work
from service.jobs.wishes import ask
from service.local_servers import free_ports
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.integration.servers import mlflow_server

HOUR_S = 3600
KEYS = ("loss", "respix/loss", "images_per_s")
_A_TRANSACTION = 120  # reports; one each would cost the test most of its time
Curve = list[tuple[int, float, int]]  # step, value, milliseconds since the epoch


@pytest.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlPlane]:
    # Nobody listens, so asking a second time is waste.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with control_plane(tmp_path) as made:
        yield made


@dataclass
class Training:
    """A job whose worker reports every metric once a second."""

    plane: ControlPlane
    job_id: str
    keys: Sequence[str] = KEYS
    step: int = 0
    sent: dict[str, Curve] = field(default_factory=dict)
    directives: set[str] = field(default_factory=set)

    async def go_on(self, seconds: int) -> None:
        """Report a step a second from now on; the plane's clock is left alone."""
        for start in range(0, seconds, _A_TRANSACTION):
            async with self.plane.sessions.begin() as session:
                for second in range(start, min(start + _A_TRANSACTION, seconds)):
                    now = self.plane.now + timedelta(seconds=second + 1)
                    reply = await work.report(session, self.job_id, 1, self._report(), now=now)
                    self.directives.add(reply.directive)
                    self._note(int(now.timestamp() * 1000))

    def _report(self) -> Report:
        self.step += 1
        points = [MetricPoint(key=key, step=self.step, value=self._value(key)) for key in self.keys]
        return Report(progress=Progress(step=self.step), metrics=points)

    def _note(self, at_ms: int) -> None:
        for key in self.keys:
            self.sent.setdefault(key, []).append((self.step, self._value(key), at_ms))

    def _value(self, key: str) -> float:
        return self.step / 8 + self.keys.index(key)

    async def recorded(self, url: str) -> dict[str, Curve]:
        """The curves that MLflow holds of this job."""
        run_id = (await self.plane.job(self.job_id)).mlflow_run_id
        assert run_id is not None
        return {key: sorted(curve(url, run_id, key)) for key in self.keys}


def curve(url: str, run_id: str, key: str) -> Curve:
    """All points of a metric as MLflow's REST tells them, doubles included."""
    asked: dict[str, Any] = {"run_id": run_id, "metric_key": key, "max_results": 2000}
    found: Curve = []
    while True:
        answer = httpx.get(f"{url}/api/2.0/mlflow/metrics/get-history", params=asked, trust_env=False).json()
        found += [(int(m.get("step", 0)), m["value"], int(m["timestamp"])) for m in answer.get("metrics", [])]
        if not (token := answer.get("next_page_token")):
            return found
        asked["page_token"] = token


def states(url: str) -> dict[str, list[str]]:
    """Job to the states of all its runs."""
    api = f"{url}/api/2.0/mlflow"
    with httpx.Client(trust_env=False) as client:
        told = client.get(f"{api}/experiments/get-by-name", params={"experiment_name": "outage"}).json()
        asked = {"experiment_ids": [told["experiment"]["experiment_id"]], "max_results": 100}
        runs = client.post(f"{api}/runs/search", json=asked).json()["runs"]
    found: dict[str, list[str]] = {}
    for run in runs:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        found.setdefault(tags["cim.job_id"], []).append(run["info"]["status"])
    return found


@asynccontextmanager
async def mlflow(folder: Path, port: int) -> AsyncIterator[str]:
    """A server on this folder, gone after the block."""
    server = mlflow_server(folder, port=port)  # it waits, and ends its processes in a loop of its own
    url = await asyncio.to_thread(server.__enter__)
    try:
        yield url
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def launched(plane: ControlPlane, name: str, *, keys: Sequence[str] = KEYS) -> Training:
    job_id = await plane.submit(name)
    await plane.reconciler().run_once()
    return Training(plane, job_id, keys)


def forwarder(plane: ControlPlane, url: str) -> Forwarder:
    """A new dispatcher's."""
    tracker = MlflowTracker(url, experiment="outage")
    return Forwarder(plane.sessions, tracker, plane.store, lease=plane.lease, public_url="http://api:8000")


async def cancelled(plane: ControlPlane, training: Training) -> None:
    """The user cancels; the worker hears of it with its next report, and stops."""
    assert training.directives == {"continue"}
    async with plane.sessions.begin() as session:
        await ask(session, training.job_id, Verb.CANCEL, now=plane.now)
    await training.go_on(1)
    assert "stop" in training.directives
    plane.advance(1)
    await plane.finish(training.job_id, 1, outcome="stopped", step=training.step)
    assert (await plane.job(training.job_id)).state is S.CANCELLED


async def test_hour_without_mlflow__costs_no_step_and_no_point(plane: ControlPlane, tmp_path: Path) -> None:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    (port,) = free_ports(1)
    ends, dies = await launched(plane, "ends"), await launched(plane, "dies")
    url = f"http://127.0.0.1:{port}"
    # As a server on this folder has stored it; starting one twice would take most of the test's time.
    await ends.go_on(10)
    await forwarder(plane, f"sqlite:///{folder / 'mlflow.db'}").run_once()
    assert (await plane.job(ends.job_id)).mlflow_metric_mark > 0
    plane.advance(10)
    sender = forwarder(plane, url)

    # There is no server. One job runs for the whole hour and ends, one is cancelled, one begins.
    goes_on = await launched(plane, "goes on")
    await ends.go_on(HOUR_S)
    await dies.go_on(60)
    await goes_on.go_on(120)
    await sender.run_once()
    plane.advance(60)
    await cancelled(plane, dies)
    await sender.run_once()
    plane.advance(HOUR_S - 61)
    await plane.finish(ends.job_id, 1, step=ends.step)
    await sender.run_once()
    assert ends.directives == goes_on.directives == {"continue"}

    async with mlflow(folder, port):
        await sender.run_once()
        for training in (ends, dies, goes_on):
            assert await training.recorded(url) == training.sent
        wanted = {ends.job_id: ["FINISHED"], dies.job_id: ["KILLED"], goes_on.job_id: ["RUNNING"]}
        assert states(url) == wanted
