"""`python -m service up` as a process: what it promises at its start and at its end."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service.processes import Record

PATIENCE_S = 900
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Up:
    """The service on one data directory, started and ended as a user does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> dict[str, str]:
        """Start, and wait for its one line."""
        self.process = self.launch(*options)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "stderr.txt").read_text()
        ready: dict[str, str] = json.loads(line)
        return ready

    def launch(self, *options: str, data: Path | None = None) -> "subprocess.Popen[str]":
        """Start without waiting."""
        command = [sys.executable, "-m", "service", "up", "--json", "--data-dir", str(data or self.data)]
        foreign = ("CIM_", "RAY_", "MLFLOW_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with (self.folder / "stderr.txt").open("a") as errors:
            return subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            )

    def refused(self, *options: str, data: Path | None = None) -> str:
        """What it says when it ends at once with status 1."""
        (self.folder / "stderr.txt").write_text("")
        assert self.launch(*options, data=data).wait(PATIENCE_S) == 1
        return (self.folder / "stderr.txt").read_text()

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def family(self) -> list[psutil.Process]:
        """Every process that was started by its present children."""
        record = Record.load(self.data / "processes.json")
        roots = [child.process() for child in record.children] if record else []
        return [p for root in roots if root for p in (root, *root.children(recursive=True))]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.end(signal.SIGTERM)
    for process in made.family():
        process.kill()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.ConnectError:
        return False


def test_up__lives_through_a_kill_and_leaves_nothing_at_its_end(up: Up) -> None:
    ready = up.start("--port", "0", "--mlflow-port", "0")
    assert set(ready) == {"api", "mlflow", "data_dir"}
    assert ready["data_dir"] == str(up.data)
    assert up.process is not None
    announced = json.loads((up.data / "service.json").read_text())
    assert announced == {**ready, "pid": up.process.pid}
    assert answers(f"{ready['api']}/readyz")
    assert answers(f"{ready['mlflow']}/health")
    for name in ("secret", "ray_token", "processes.json"):
        assert (up.data / name).stat().st_mode & 0o077 == 0

    # A second one is refused, whether for the folder or for the port.
    assert f"process {up.process.pid}" in up.refused()
    port = ready["api"].rpartition(":")[2]
    told = up.refused("--port", port, data=up.folder / "other")
    assert f"port {port} of 127.0.0.1 is in use" in told
    assert "--port 0" in told

    # Killed, its children go on, and the next start takes them over at the same addresses.
    before = up.family()
    up.end(signal.SIGKILL)
    assert len(alive(before)) == len(before) > 5
    assert not answers(f"{ready['api']}/readyz")
    assert up.start() == ready
    roots = {process.pid for process in before[:1]}
    assert roots <= {process.pid for process in up.family()}
    assert answers(f"{ready['api']}/readyz")

    # Ended, nothing is left but the data.
    family = up.family()
    temp_dir = Path(json.loads((up.data / "processes.json").read_text())["facts"]["ray_temp_dir"])
    assert temp_dir.exists()
    assert up.end(signal.SIGTERM) == 0
    assert alive(family) == []
    assert not temp_dir.parent.exists()
    assert not (up.data / "service.json").exists()
    assert not (up.data / "processes.json").exists()
    assert (up.data / "cim.db").exists()


def test_up__ctrl_c_while_it_starts_leaves_nothing(up: Up) -> None:
    up.process = up.launch("--port", "0", "--mlflow-port", "0")
    while not (family := up.family()):
        assert up.process.poll() is None
    assert up.end(signal.SIGINT) == 0
    assert alive(family) == []
    assert not (up.data / "processes.json").exists()


def test_up__a_taken_mlflow_port_is_told_before_anything_starts(up: Up) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = up.refused("--port", "0", "--mlflow-port", str(port))
    assert f"port {port} of 127.0.0.1 is in use" in told
    assert "--mlflow-port 0" in told
    assert not (up.data / "processes.json").exists()
