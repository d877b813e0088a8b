"""Two dispatchers as processes of their own, on one PostgreSQL and one cluster that a test can steer.

The one that works is frozen, or killed, in the middle of a call to the cluster.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from service.db.engine import create_engine, create_sessions
from service.db.leases import Lease
from service.db.upgrade import upgrade
from service.dispatch.ray_launcher import RayLauncher
from service.domain.decide import ClusterState
from service.domain.names import submission_id
from service.processes import Child, end
from service.store.directory import DirectoryStore
from tests.fakes.control_plane import ControlPlane
from tests.fakes.launcher_contract import LauncherContract
from tests.fakes.ray_server import RayServer, ray_server

PATIENCE_S = 120
SETTINGS = {
    "CIM_PUBLIC_URL": "http://127.0.0.1:9",
    "CIM_SECRET": "s" * 32,
    "CIM_LEASE_S": "3",
    "CIM_RECONCILE_EVERY_S": "0.1",
    "CIM_LOST_GRACE_S": "0.2",
    "CIM_RETRY_FIRST_S": "0.2",
    "CIM_STOP_GRACE_S": "0.2",
}


class TestRayServer(LauncherContract):
    """The stand-in, as the dispatcher talks to it."""

    @pytest.fixture
    def launcher(self) -> Iterator[RayLauncher]:
        with ray_server() as ray:
            yield RayLauncher(ray.url)


def eventually(what: str, holds: Callable[[], Any]) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)
    return answer


@dataclass
class Replicas:
    """The dispatchers, and what all of them see."""

    ray: RayServer
    database: str  # for SQLAlchemy
    folder: Path
    running: list[Child] = field(default_factory=list)

    def start(self) -> None:
        name = f"dispatcher-{len(self.running)}"
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("CIM_")},
            **SETTINGS,
            "CIM_DATABASE_URL": self.database,
            "CIM_STORE_URL": str(self.folder / "store"),
            "CIM_RAY_URL": self.ray.url,
        }
        command = [sys.executable, "-m", "service", "dispatcher"]
        log = self.folder / f"{name}.log"
        self.running.append(Child.start(name, command, env=env, log=log, cwd=Path.cwd()))

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        url = self.database.replace("postgresql+psycopg://", "postgresql://", 1)
        with psycopg.connect(url) as connection:
            return connection.execute(query, values).fetchall()

    def holder(self) -> Child | None:
        """The dispatcher that has the lease."""
        found = self.ask(
            "SELECT owner FROM leases WHERE name = 'reconcile' AND expires_at > clock_timestamp()"
        )
        pids = [int(owner.split(":")[1]) for (owner,) in found]
        return next((child for child in self.running if child.pid in pids), None)

    def told(self, child: Child, text: str) -> int:
        """How often it has said so."""
        return (self.folder / f"{child.name}.log").read_text().count(text)

    def moves(self, job_id: str) -> list[str]:
        query = "SELECT dst FROM events WHERE job_id = %s AND dst IS NOT NULL ORDER BY id"
        return [state for (state,) in self.ask(query, job_id)]

    def at_call(self, call: str, number: signal.Signals) -> list[Child]:
        """Once, when the dispatcher that has the lease makes `call`, send it a signal, and list it."""
        hit: list[Child] = []

        def on_call(moment: str, name: str) -> None:
            if not hit and (moment, name) == ("before", call) and (child := self.holder()) is not None:
                hit.append(child)
                os.kill(child.pid, number)

        self.ray.launcher.on_call = on_call
        return hit


@pytest.fixture
def replicas(postgres_url: str, tmp_path: Path) -> Iterator[Replicas]:
    upgrade(postgres_url)
    with ray_server() as ray:
        made = Replicas(ray, postgres_url, tmp_path)
        try:
            for _ in range(2):
                made.start()
            # The other one has said that it stands by, so both are there.
            eventually("one leads, one stands by", lambda: all(_is_up(made, c) for c in made.running))
            yield made
        finally:
            for child in made.running:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGCONT)
            asyncio.run(end(made.running, grace_s=5))


def _is_up(replicas: Replicas, child: Child) -> bool:
    assert child.process() is not None, (replicas.folder / f"{child.name}.log").read_text()[-3000:]
    return bool(replicas.told(child, "is ours") or replicas.told(child, "standing by"))


@dataclass
class Story:
    """A job whose first driver dies without a word and whose second one succeeds."""

    replicas: Replicas
    plane: ControlPlane
    job_id: str = ""

    MOVES = ("queued", "launching", "running", "retrying", "launching", "running", "succeeded")

    async def submit(self) -> None:
        self.plane.now = await self._now()
        self.job_id = await self.plane.submit()

    async def play(self) -> None:
        for number, last in ((1, False), (2, True)):
            await self.until(f"attempt {number}", self._submitted(number))
            self.plane.now = await self._now()
            await self.plane.report(self.job_id, number)
            if last:
                await self.plane.finish(self.job_id, number)
            with self.replicas.ray.lock:
                state = ClusterState.SUCCEEDED if last else ClusterState.FAILED
                self.replicas.ray.launcher.end(submission_id(self.job_id, number), state, log="dead")
        query = "SELECT 1 FROM attempts WHERE job_id = %s AND ray_ended_at IS NOT NULL"
        await self.until("both ended", lambda: len(self.replicas.ask(query, self.job_id)) == 2)

    async def until(self, what: str, holds: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(eventually, what, holds)

    def _submitted(self, number: int) -> Callable[[], bool]:
        return lambda: submission_id(self.job_id, number) in self.replicas.ray.launcher.jobs

    def rows(self) -> list[Any]:
        """All that a dispatcher could have written."""
        tables = ("jobs", "attempts ORDER BY number", "events ORDER BY id")
        return [self.replicas.ask(f"SELECT * FROM {table}") for table in tables]

    def assert_told_once(self) -> None:
        assert self.replicas.moves(self.job_id) == list(self.MOVES)
        started = self.replicas.ray.launcher.num_started
        assert started == {submission_id(self.job_id, n): 1 for n in (1, 2)}
        outcomes = self.replicas.ask("SELECT number, outcome FROM attempts ORDER BY number")
        assert outcomes == [(1, "failed"), (2, "succeeded")]

    async def _now(self) -> Any:
        return (await asyncio.to_thread(self.replicas.ask, "SELECT clock_timestamp()"))[0][0]


@pytest.fixture
async def story(replicas: Replicas) -> Any:
    engine = create_engine(replicas.database)
    # The test speaks as the worker; the lease is the dispatchers'.
    none = Lease(name="none", owner="the test", token=0, lasts_s=0)
    store = DirectoryStore(replicas.folder / "store")
    yield Story(replicas, ControlPlane(create_sessions(engine), store, none))
    await engine.dispose()


def _assert_told_once(story: Story) -> None:
    launcher = story.replicas.ray.launcher
    assert story.replicas.moves(story.job_id) == list(Story.MOVES)
    assert launcher.num_started == {submission_id(story.job_id, n): 1 for n in (1, 2)}
    outcomes = story.replicas.ask("SELECT number, outcome FROM attempts ORDER BY number")
    assert outcomes == [(1, "failed"), (2, "succeeded")]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["submit", "status", "log_tail", "stop"])
async def test_frozen__the_other_one_goes_on_and_the_sleeper_writes_nothing(story: Story, call: str) -> None:
    replicas = story.replicas
    hit = replicas.at_call(call, signal.SIGSTOP)
    await story.submit()
    await story.play()
    (sleeper,) = hit
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED
    other = await story.until("another holder", replicas.holder)
    assert other is not sleeper
    written = story.rows()

    os.kill(sleeper.pid, signal.SIGCONT)
    # After these two calls the pass has something to write.
    noticed = "under way is dropped" if call in ("submit", "log_tail") else "ran out or was taken over"
    await story.until("it notices", lambda: replicas.told(sleeper, noticed))
    await story.until("it stands by", lambda: replicas.told(sleeper, "standing by"))
    assert replicas.holder() is other
    assert story.rows() == written
    story.assert_told_once()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["submit", "log_tail"])
async def test_killed__the_other_one_goes_on(story: Story, call: str) -> None:
    replicas = story.replicas
    hit = replicas.at_call(call, signal.SIGKILL)
    await story.submit()
    await story.play()
    (killed,) = hit
    assert killed.process() is None
    assert await story.until("another holder", replicas.holder) is not killed
    story.assert_told_once()


@pytest.mark.slow
async def test_stopped__it_gives_its_lease_back(story: Story) -> None:
    replicas = story.replicas
    first = await story.until("a holder", replicas.holder)
    first.process().send_signal(signal.SIGTERM)
    await story.until("it ends", lambda: first.process() is None)
    assert replicas.holder() is not first, "it left without a word"
    assert await story.until("another holder", replicas.holder) is not first
    await story.submit()
    await story.play()
    story.assert_told_once()
