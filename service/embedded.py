"""Embedded mode, `cim up`: everything on one machine, nothing listening beyond loopback.

API and dispatcher run in this process on SQLite and a folder. A Ray head and an MLflow server are
children that end with it. If this process is killed they go on, with the jobs in them, and the next
start on the same folder takes them over: same ports, same jobs.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from pydantic import SecretStr

from service.contracts.allowed import EVERYTHING
from service.data_folder import DataFolder
from service.dispatch.launcher import LauncherUnavailableError
from service.dispatch.ray_launcher import RayLauncher
from service.local_servers import LOOPBACK, MlflowServer, RayHead, free_ports, is_free, num_cpus
from service.processes import Child, Record, end
from service.settings import Settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Serve = Callable[[Settings, socket.socket, asyncio.Event, Callable[[], None]], Coroutine[Any, Any, None]]

DEFAULT_PORT, DEFAULT_MLFLOW_PORT = 8000, 5000
_START_LIMIT_S = 600.0  # 10 to 20 s on two idle cores, minutes on busy ones
_STARTS = 5  # Ray's node gives up where two cores are shared with much else
_POLL_S = 0.25
_END_GRACE_S = 4.0
_RESTART_PAUSE_S = 5.0
_LOG_END_BYTES = 4096
_LONGEST_TEMP_DIR = 36  # characters; Ray needs the rest of a socket address's 107


class UpError(Exception):
    """The service cannot start here; the message says what to do."""


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM came."""


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What the user asked for. A port that is None is that of the killed run, or the default."""

    data_dir: Path
    port: int | None = None
    mlflow_port: int | None = None
    as_json: bool = False


async def up(options: UpOptions, *, environ: Mapping[str, str], serve: Serve) -> None:
    """Run the embedded service until SIGINT or SIGTERM; nothing that it started is left then.

    `serve(settings, socket, stop, on_ready)` runs api and dispatcher until `stop` is set.

    Raises:
        UpError: it cannot start.
        FolderTakenError: another one runs on the same data directory.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    folder = DataFolder.at(options.data_dir)
    folder.prepare()
    with folder.locked():
        embedded = _Embedded(options, folder, environ=environ, stop=stop)
        try:
            await embedded.run(serve)
        except _StoppedError:
            _tell("stopped before it was ready")
        finally:
            await embedded.end()


class _Embedded:
    """One run of the embedded service. Making it claims the ports and starts nothing."""

    def __init__(
        self, options: UpOptions, folder: DataFolder, *, environ: Mapping[str, str], stop: asyncio.Event
    ) -> None:
        self._options, self._folder, self._stop = options, folder, stop
        self._environ = dict(environ)
        self._left = _load(folder.record)
        self._children = {child.name: child for child in self._left.children if child.process() is not None}
        self._socket = _listen(_wanted(options.port, self._left.facts.get("port"), DEFAULT_PORT))
        self._mlflow = self._find_mlflow()
        self._ray = self._find_ray()
        self._starts = {"Ray": self._start_ray, "MLflow": self._start_mlflow}

    async def run(self, serve: Serve) -> None:
        """Start or take over the children, then serve until told to stop."""
        await end([c for c in self._left.children if c.name not in self._children], grace_s=1.0)
        for name, start in self._starts.items():
            if name in self._children:
                _tell(f"found {name} of the last run, process {self._children[name].pid}")
            else:
                _tell(f"starting {name} ...")
                self._keep(start())
        settings = self._settings()
        await self._unless_stopped(self._ready(settings))
        watching = asyncio.create_task(self._watch())
        try:
            await serve(settings, self._socket, self._stop, self._announce)
        finally:
            watching.cancel()

    async def end(self) -> None:
        """End every child and all that it started; afterwards nothing tells of this run."""
        self._folder.announcement.unlink(missing_ok=True)
        self._socket.close()
        num_killed = await end(self._children.values(), grace_s=_END_GRACE_S)
        logger.info("children ended, %d of their processes had to be killed", num_killed)
        shutil.rmtree(self._ray.temp_dir.parent, ignore_errors=True)
        self._folder.record.unlink(missing_ok=True)

    def _find_ray(self) -> RayHead:
        """The head that still runs, or a new one with ports of its own."""
        facts = self._left.facts
        if "Ray" in self._children:
            ports = [int(facts["ray_gcs_port"]), int(facts["ray_dashboard_port"])]
            temp_dir = Path(facts["ray_temp_dir"])
        else:
            if "ray_temp_dir" in facts:
                shutil.rmtree(Path(facts["ray_temp_dir"]).parent, ignore_errors=True)
            ports = free_ports(2)
            temp_dir = _short_temp_dir() / "r"
        token_path = self._folder.ray_token
        return RayHead(gcs_port=ports[0], dashboard_port=ports[1], temp_dir=temp_dir, token_path=token_path)

    def _find_mlflow(self) -> MlflowServer:
        recorded = self._left.facts.get("mlflow_port")
        if "MLflow" in self._children and recorded is not None:
            return MlflowServer(port=int(recorded), folder=self._folder.mlflow)
        port = _wanted(self._options.mlflow_port, recorded, DEFAULT_MLFLOW_PORT)
        if port == 0:
            (port,) = free_ports(1)
        elif not is_free(port):
            raise UpError(_port_taken(port, option="--mlflow-port"))
        return MlflowServer(port=port, folder=self._folder.mlflow)

    def _start_ray(self) -> Child:
        self._folder.secret(self._folder.ray_token.name)
        command = self._ray.command(num_cpus=num_cpus())
        return self._start("Ray", command, env=self._ray.env(self._environ))

    def _start_mlflow(self) -> Child:
        # Ray's node gives up after 15 s, and loading MLflow takes 10 s of a core: Ray goes first.
        env = self._mlflow.env(self._environ)
        return self._start("MLflow", self._mlflow.command(), env=env, niceness=10)

    def _start(self, name: str, command: list[str], *, env: Mapping[str, str], niceness: int = 0) -> Child:
        log = self._folder.log(name.lower())
        return Child.start(name, command, env=env, log=log, cwd=self._folder.path, niceness=niceness)

    def _keep(self, child: Child) -> None:
        """Write a child down at once: a kill right after this must not lose it."""
        self._children[child.name] = child
        facts = {
            "port": str(self._socket.getsockname()[1]),
            "mlflow_port": str(self._mlflow.port),
            "ray_gcs_port": str(self._ray.gcs_port),
            "ray_dashboard_port": str(self._ray.dashboard_port),
            "ray_temp_dir": str(self._ray.temp_dir),
        }
        Record(children=tuple(self._children.values()), facts=facts).save(self._folder.record)

    def _settings(self) -> Settings:
        port = self._socket.getsockname()[1]
        return Settings(
            data_dir=self._folder.path,
            database_url=self._folder.database_url,
            store_url=str(self._folder.objects),
            s3_endpoint_url=None,
            s3_region=None,
            # Workers run as this person on this machine: they can read what this person can, and no more.
            allowed_storage=self._environ.get("CIM_ALLOWED_STORAGE", EVERYTHING),
            shared_filesystem=True,
            ray_url=self._ray.url,
            ray_token=SecretStr(self._folder.secret(self._folder.ray_token.name)),
            mlflow_url=self._mlflow.url,
            mlflow_public_url=None,
            host=LOOPBACK,
            port=port,
            public_url=f"http://{LOOPBACK}:{port}",
            secret=SecretStr(self._folder.secret("secret")),
            worker_python=sys.executable,
        )

    async def _ready(self, settings: Settings) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:

            async def mlflow() -> bool:
                return (await http.get(f"{self._mlflow.url}/health")).is_success

            await asyncio.gather(
                self._until("Ray", lambda: _has_cpus(settings)), self._until("MLflow", mlflow)
            )

    async def _until(self, name: str, ready: Callable[[], Awaitable[bool]]) -> None:
        """Wait for one child.

        Raises:
            UpError: it ended, or took too long.
        """
        deadline, tries_left = time.monotonic() + _START_LIMIT_S, _STARTS - 1
        while not await _answers(ready):
            if self._children[name].process() is None:
                if tries_left == 0:
                    raise UpError(f"{name} ended while it started. {self._last_lines(name)}")
                tries_left -= 1
                _tell(f"{name} ended while it started, trying again ...")
                await self._start_again(name)
            if time.monotonic() > deadline:
                raise UpError(f"{name} is not ready after {_START_LIMIT_S:g} s. {self._last_lines(name)}")
            await asyncio.sleep(_POLL_S)
        _tell(f"{name} is ready")

    def _last_lines(self, name: str) -> str:
        log = self._folder.log(name.lower())
        try:
            with log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
                lines = file.read().decode(errors="replace").splitlines()[-5:]
        except OSError as error:
            lines = [str(error)]
        return "\n  ".join([f"The end of {log}:", *lines])

    async def _watch(self) -> None:
        """Start a child again that has died. Its jobs are retried from their last checkpoints."""
        while not self._stop.is_set():
            await asyncio.sleep(_RESTART_PAUSE_S)
            for name, child in list(self._children.items()):
                if child.process() is None and not self._stop.is_set():
                    logger.error("%s has ended; starting it again. %s", name, self._last_lines(name))
                    try:
                        await self._start_again(name)
                    except (OSError, psutil.Error):  # out of processes or memory: it may pass
                        logger.exception("%s could not be started", name)

    async def _start_again(self, name: str) -> None:
        """Clear away what a dead child has left, and start another."""
        await end([self._children[name]], grace_s=1.0)
        self._keep(self._starts[name]())

    async def _unless_stopped(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, unless the user has enough before it is there."""
        working = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _StoppedError
            return working.result()
        finally:
            working.cancel()
            stopped.cancel()

    def _announce(self) -> None:
        """Tell the user, and every client that looks into the data directory."""
        api = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        where = {"api": api, "mlflow": self._mlflow.url, "data_dir": str(self._folder.path)}
        self._folder.announce(json.dumps({**where, "pid": os.getpid()}))
        if self._options.as_json:
            _say(json.dumps(where))
            return
        _say(f"cim is ready.\n  API docs   {api}/docs\n  MLflow     {self._mlflow.url}")
        _say(f"  data       {self._folder.path}\nCtrl-C ends it and everything it started.")


def _load(path: Path) -> Record:
    try:
        return Record.load(path) or Record(facts={})
    except ValueError as error:
        raise UpError(str(error)) from error


def _wanted(given: int | None, recorded: str | None, default: int) -> int:
    if given is not None:
        return given
    return default if recorded is None else int(recorded)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port), backlog=2048)
    except OSError as error:
        raise UpError(_port_taken(port, option="--port")) from error


def _port_taken(port: int, *, option: str) -> str:
    return (
        f"port {port} of {LOOPBACK} is in use by another program; choose one with {option} N, "
        f"or any free one with {option} 0"
    )


def _short_temp_dir() -> Path:
    """A new folder for this user alone, with a path that leaves room for Ray's socket names."""
    usual = tempfile.gettempdir()
    parent = usual if len(usual) + len("/cim-12345678/r") <= _LONGEST_TEMP_DIR else "/tmp"  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="cim-", dir=parent))


async def _has_cpus(settings: Settings) -> bool:
    token = settings.ray_token.get_secret_value() if settings.ray_token else None
    launcher = RayLauncher(settings.ray_url, token=token)
    try:
        return (await launcher.capacity()).cpus > 0
    finally:
        await launcher.close()


async def _answers(ready: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await ready()
    except (httpx.HTTPError, LauncherUnavailableError):
        return False


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
