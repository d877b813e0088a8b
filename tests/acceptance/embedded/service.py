"""A `python -m service up` process under test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from service.client import Client
from service.contracts.jobs import FINAL, JobView
from service.data_folder import DataFolder
from service.processes import Record

PATIENCE_S = 300
_OF_THE_CLUSTER = "_AutoscalingCoordinatorActor"  # Ray Train's own, one a head for all jobs; it holds no CPU


class Embedded:
    """The embedded service on one data directory; it can be killed and started again."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.api = self.mlflow = ""
        self._process: subprocess.Popen[str] | None = None

    @property
    def client(self) -> Client:
        """A client of the running service."""
        return Client(self.api)

    def start(self) -> None:
        """Start and wait for the one line that says it is ready."""
        ports = [] if self.api else ["--port", "0", "--mlflow-port", "0"]
        command = [sys.executable, "-m", "service", "up", "--data-dir", str(self.data_dir), "--json", *ports]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the service ended with status {self._process.wait()} before it was ready"
        ready = json.loads(line)
        self.api, self.mlflow = ready["api"], ready["mlflow"]

    def descendants(self, *names: str) -> list[psutil.Process]:
        """Everything below Ray and MLflow, or one of them: no children of a service that took them over."""
        record = Record.load(DataFolder(path=self.data_dir).record)
        assert record is not None, "the service is not running"
        children = [child for child in record.children if not names or child.name in names]
        roots = [process for child in children if (process := child.process()) is not None]
        return [*roots, *(process for root in roots for process in root.children(recursive=True))]

    def alive_in_ray(self) -> list[str]:
        """Every actor and placement group of a job that Ray does not count as gone."""
        record = Record.load(DataFolder(path=self.data_dir).record)
        assert record is not None, "the service is not running"
        headers = {"Authorization": f"Bearer {DataFolder(path=self.data_dir).ray_token.read_text()}"}
        url = f"http://127.0.0.1:{record.facts['ray_dashboard_port']}/api/v0"
        told = ("class_name", "name", "job_id", "creator_job_id", "state")
        found = []
        with httpx.Client(headers=headers, trust_env=False, timeout=30.0) as http:
            for what, gone in (("actors", "DEAD"), ("placement_groups", "REMOVED")):
                answer = http.get(f"{url}/{what}?detail=true&limit=10000").raise_for_status().json()
                rows = [row for row in answer["data"]["result"]["result"] if row["state"] != gone]
                rows = [row for row in rows if row.get("class_name") != _OF_THE_CLUSTER]
                found += [f"{what}: " + " ".join(f"{key}={row.get(key)}" for key in told) for row in rows]
        return found

    def kill(self) -> None:
        """SIGKILL the service alone; Ray and MLflow go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, as Ctrl-C does; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def finished(self, job_id: str) -> JobView:
        """The job once it is final."""
        return self.until(job_id, lambda job: job.state in FINAL)

    def until(self, job_id: str, condition: Callable[[JobView], bool]) -> JobView:
        """The job as soon as `condition` holds; fails with what it was doing when patience ends."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            job = self.client.job(job_id)
            if condition(job):
                return job
            assert job.state not in FINAL, f"{job.name} is {job.state}: {job.reason}"
            assert time.monotonic() < deadline, f"{job.name} is still {job.state}: {job.progress}"
            time.sleep(0.3)


def _environment() -> dict[str, str]:
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("CIM_", "RAY_", "MLFLOW_"))
    }
