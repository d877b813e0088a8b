"""A `python -m service up` process under test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from service.client import Client
from service.contracts.jobs import FINAL, JobView
from service.data_folder import DataFolder
from service.processes import Record

PATIENCE_S = 300


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

    def descendants(self) -> list[psutil.Process]:
        """Everything below Ray and MLflow, which are no children of a service that took them over."""
        record = Record.load(DataFolder(path=self.data_dir).record)
        assert record is not None, "the service is not running"
        roots = [process for child in record.children if (process := child.process()) is not None]
        return [*roots, *(process for root in roots for process in root.children(recursive=True))]

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
