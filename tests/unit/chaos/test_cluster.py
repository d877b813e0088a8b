"""The campaign's cluster passes the contract of the real one, and forgets everything when it is killed."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service.dispatch.launcher import LauncherUnavailableError
from service.dispatch.ray_launcher import RayLauncher
from service.domain.decide import ClusterState
from service.local_servers import free_ports
from service.processes import Child, end
from tests.chaos.journal import FOLDER, read
from tests.chaos.stack import ROOT, until
from tests.fakes.launcher_contract import LauncherContract, ended, submission


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    child = begin(folder, port)
    yield f"http://127.0.0.1:{port}"
    asyncio.run(end([child], grace_s=2))


@pytest.fixture
async def launcher(head: str) -> AsyncIterator[RayLauncher]:
    made = RayLauncher(head)
    yield made
    await made.close()


def begin(folder: Path, port: int) -> Child:
    told = ["--port", str(port), "--folder", str(folder), "--cpus", "4"]
    command = [sys.executable, "-m", "tests.chaos.cluster", *told]
    env = {FOLDER: str(folder), "PYTHONPATH": str(ROOT)}
    child = Child.start("head", command, env=env, log=folder / "head.log", cwd=ROOT)
    url = f"http://127.0.0.1:{port}/api/v0/nodes"
    until(lambda: httpx.get(url, trust_env=False).is_success, within_s=60, what="the cluster answers")
    return child


class TestCluster(LauncherContract): ...


async def test_stop__kills_what_does_not_listen(launcher: RayLauncher, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ignore = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = submission(f"{ignore}; pathlib.Path({str(ready)!r}).touch(); time.sleep(600)")
    await launcher.submit(deaf)
    await asyncio.to_thread(until, ready.exists, within_s=60, what="the process ignores SIGTERM")
    await launcher.stop(deaf.id)
    end_of = await ended(launcher, deaf.id)
    assert (end_of.state, end_of.exit_code) == (ClusterState.STOPPED, -9)


async def test_kill__the_jobs_go_on_and_are_forgotten(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    child, job = begin(tmp_path, port), submission("import time; time.sleep(600)")
    launcher = RayLauncher(f"http://127.0.0.1:{port}")
    await launcher.submit(job)
    process = child.process()
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(LauncherUnavailableError):
        await launcher.status(job.id)
    again = begin(tmp_path, port)
    assert await launcher.status(job.id) is None
    (fact,) = [fact for fact in read(tmp_path) if fact["kind"] == "submitted"]
    worker = psutil.Process(fact["worker_pid"])
    assert worker.is_running()
    worker.kill()
    await launcher.close()
    await end([again], grace_s=2)
