"""The service's processes on a database, each on its own, and the baseline beside them."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.load.database import for_sqlalchemy
from service.local_servers import free_ports
from service.processes import Child, end

ROOT = Path(__file__).resolve().parents[2]
_START_S = 120.0
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Api:
    """One that answers."""

    url: str
    child: Child


def environment(uri: str, folder: Path, *, port: int, cluster: str) -> dict[str, str]:
    """The settings of api and dispatcher on the database at `uri`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("CIM_", "RAY_"))}
    return {
        **plain,
        "PYTHONPATH": str(ROOT),
        "CIM_DATABASE_URL": for_sqlalchemy(uri),
        "CIM_STORE_URL": str(folder),
        "CIM_ALLOWED_STORAGE": "s3://photos/",
        "CIM_RAY_URL": cluster,
        "CIM_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "CIM_PORT": str(port),
        "CIM_SECRET": "b" * 32,
    }


@contextmanager
def process(module: Sequence[str], env: Mapping[str, str], folder: Path, *, url: str = "") -> Iterator[Child]:
    """`python -m MODULE`, gone after the block; with `url` the block begins when that answers."""
    log = folder / f"{module[-1]}.log"
    child = Child.start(module[-1], [sys.executable, "-m", *module], env=env, log=log, cwd=ROOT)
    try:
        if url:
            wait_for(url, child, log)
        yield child
    finally:
        asyncio.run(end([child], grace_s=10))


def wait_for(url: str, child: Child, log: Path) -> None:
    """Return once `url` answers with success; raises RuntimeError with the log's end where it never does."""
    deadline = time.monotonic() + _START_S
    with httpx.Client(trust_env=False) as http:
        while time.monotonic() < deadline and child.process() is not None:
            try:
                if http.get(url).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(_LOOK_S)
    raise RuntimeError(f"{child.name} does not answer:\n{log.read_text(errors='replace')[-2000:]}")


@contextmanager
def api(uri: str, folder: Path, *, cluster: str = "http://127.0.0.1:1") -> Iterator[Api]:
    """An api on that database."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    env = environment(uri, folder, port=port, cluster=cluster)
    with process(("service", "api"), env, folder, url=f"{url}/readyz") as child:
        yield Api(url=url, child=child)


@contextmanager
def dispatcher(uri: str, folder: Path, *, cluster: str) -> Iterator[Child]:
    """A dispatcher on that database."""
    env = environment(uri, folder, port=1, cluster=cluster)
    with process(("service", "dispatcher"), env, folder) as child:
        yield child


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """The address of a cluster that takes every job and runs none."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, "PORT": str(port), "PYTHONPATH": str(ROOT)}
    with process(("benchmarks.load.cluster",), env, folder, url=f"{url}/api/v0/nodes"):
        yield url


@contextmanager
def bare(uri: str, folder: Path) -> Iterator[str]:
    """The address of the baseline: FastAPI and one INSERT."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, "PORT": str(port), "DATABASE_URL": for_sqlalchemy(uri), "PYTHONPATH": str(ROOT)}
    with process(("benchmarks.load.bare",), env, folder, url=f"{url}/things"):
        yield url
