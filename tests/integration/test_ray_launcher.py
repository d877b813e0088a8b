"""The launcher's contract on a real Ray head."""

from collections.abc import AsyncIterator

import psutil
import pytest

from service.dispatch.launcher import LauncherUnavailableError
from service.dispatch.ray_launcher import RayLauncher
from service.domain.decide import ClusterState
from service.domain.queueing import Needs
from tests.fakes.launcher_contract import LauncherContract, ended, submission
from tests.integration.servers import RayCluster


class TestRayLauncher(LauncherContract):
    @pytest.fixture
    async def launcher(self, ray_cluster: RayCluster) -> AsyncIterator[RayLauncher]:
        made = RayLauncher(ray_cluster.url, token=ray_cluster.token)
        yield made
        await made.close()


async def test_capacity__is_what_the_head_was_given(ray_cluster: RayCluster) -> None:
    launcher = RayLauncher(ray_cluster.url, token=ray_cluster.token)
    assert (await launcher.capacity()).cpus == 2
    assert Needs(cpus=2).gpus == 0
    await launcher.close()


async def test_token__is_demanded(ray_cluster: RayCluster) -> None:
    launcher = RayLauncher(ray_cluster.url, token=None)
    with pytest.raises(LauncherUnavailableError, match="CIM_RAY_TOKEN"):
        await launcher.status("cim-x-1")
    await launcher.close()


async def test_drivers__hold_no_cpus(ray_cluster: RayCluster) -> None:
    """Three drivers run at once on two CPUs; their workers need those."""
    launcher = RayLauncher(ray_cluster.url, token=ray_cluster.token)
    jobs = [submission("import time; time.sleep(600)") for _ in range(3)]
    for job in jobs:
        await launcher.submit(job)
    states = [await launcher.status(job.id) for job in jobs]
    for job in jobs:
        await launcher.stop(job.id)
    ends = [(await ended(launcher, job.id)).state for job in jobs]
    await launcher.close()
    assert all(state is not None for state in states)
    assert ends == [ClusterState.STOPPED] * 3


async def test_log_tail__of_a_flood_is_short(ray_cluster: RayCluster) -> None:
    launcher = RayLauncher(ray_cluster.url, token=ray_cluster.token)
    job = submission("for n in range(5000): print(n)\nprint('x' * 3_000_000)\nprint('the last words')")
    await launcher.submit(job)
    await ended(launcher, job.id)
    tail = await launcher.log_tail(job.id, max_lines=200)
    few = await launcher.log_tail(job.id, max_lines=1)
    await launcher.close()
    assert few == [tail[-1]] == ["the last words"]
    assert sum(map(len, tail)) < 100_000


def test_head__listens_on_loopback_alone(ray_cluster: RayCluster) -> None:
    root = ray_cluster.child.process()
    assert root is not None
    family = {process.pid for process in [root, *root.children(recursive=True)]}
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in family]
    hosts = {str(c.laddr[0]).removeprefix("::ffff:") for c in listening if c.laddr}
    assert len(listening) > 5
    assert hosts == {"127.0.0.1"}
