"""The command lines of embedded mode's Ray head and MLflow server. Both listen on loopback alone."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 256 * 2**20  # images travel through files, so Ray's share of memory can be small
_FOREIGN = ("CIM_", "RAY_", "MLFLOW_")  # settings of another service, or our secret


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """Where a Ray head listens and what it may use."""

    gcs_port: int
    dashboard_port: int
    temp_dir: Path  # short: Ray puts unix sockets 70 characters below it, of at most 107
    token_path: Path

    @property
    def url(self) -> str:
        """The dashboard."""
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    def command(self, *, num_cpus: int) -> list[str]:
        """`ray start`, staying in the foreground, with every port that has a fixed default replaced."""
        agent, agent_grpc, runtime_env, metrics, node, objects, client = free_ports(7)
        options = {
            "node-ip-address": LOOPBACK,
            "port": self.gcs_port,
            "include-dashboard": "true",
            "dashboard-host": LOOPBACK,
            "dashboard-port": self.dashboard_port,
            "temp-dir": self.temp_dir,
            "num-cpus": num_cpus,
            "object-store-memory": _OBJECT_STORE_BYTES,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "runtime-env-agent-port": runtime_env,
            "metrics-export-port": metrics,
            "node-manager-port": node,
            "object-manager-port": objects,
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        told = [f"--{name}={value}" for name, value in options.items()]
        # The script's module: its console entry need not be on the PATH of whoever started us.
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        return [*ray, "start", "--head", "--block", "--disable-usage-stats", *told]

    def env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment of the head, and through it of the workers."""
        autoscaler, dashboard = free_ports(2)
        return {
            **_without_foreign(environ),
            # Set explicitly everywhere: left open, Ray takes its mode from whatever lies in the home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            # Ray replaces 127.0.0.1 by the machine's outer address where it may form clusters.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": str(self.temp_dir),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Its node gives up after 15 s on a busy machine; this is how soon we hear of it.
            "RAY_raylet_start_wait_time_s": "40",
            "AUTOSCALER_METRIC_PORT": str(autoscaler),
            "DASHBOARD_METRIC_PORT": str(dashboard),
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    """Where an MLflow server listens and keeps its data."""

    port: int
    folder: Path

    @property
    def url(self) -> str:
        """API and browser pages."""
        return f"http://{LOOPBACK}:{self.port}"

    def command(self) -> list[str]:
        """`mlflow server` with one worker process; artifacts travel through it."""
        options = {
            "host": LOOPBACK,
            "port": self.port,
            "workers": 1,
            "backend-store-uri": f"sqlite:///{self.folder / 'mlflow.db'}",
            "artifacts-destination": (self.folder / "artifacts").as_uri(),
        }
        told = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "mlflow", "server", *told]

    def env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment of the server."""
        return {
            **_without_foreign(environ),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves processes of 235 MB each
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different. Another process may still be faster."""
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of loopback."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True


def num_cpus() -> int:
    """CPUs of this machine."""
    return os.cpu_count() or 1


def _without_foreign(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_FOREIGN)}
