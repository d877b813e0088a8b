"""The part of Ray's Jobs interface that the service uses, with a real process for each submission.

`python -m tests.chaos.cluster --port P --folder F --cpus N`. It behaves as Ray 2.60 was measured to: a second
job of one id is refused with status 500, a stop is SIGTERM and three seconds later SIGKILL, nothing outlives
the head but the processes, which end by themselves some seconds after it (see `tests.chaos.worker`).
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.chaos.journal import FOLDER, HEAD_PID, Journal

STOP_WAIT_S = 3.0
_JOB = re.compile(r"/api/jobs/([^/?]+)(/stop)?$")
_LOG = re.compile(r"/api/v0/logs/file\?node_id=n1&submission_id=([^&]+)&lines=(\d+)$")


@dataclass(kw_only=True)
class Job:
    """One submission and its process."""

    process: "subprocess.Popen[bytes]"
    log: Path
    stopped: bool = False

    def status(self) -> dict[str, Any]:
        """As Ray tells it."""
        code = self.process.poll()
        if code is None:
            return {"status": "RUNNING", "message": "Job is running.", "driver_exit_code": None}
        if self.stopped:
            return {
                "status": "STOPPED",
                "message": "Job was intentionally stopped.",
                "driver_exit_code": code,
            }
        state = "SUCCEEDED" if code == 0 else "FAILED"
        return {"status": state, "message": f"Job ended with exit code {code}.", "driver_exit_code": code}

    def stop(self) -> None:
        """SIGTERM now, SIGKILL later."""
        if self.process.poll() is None:
            self.stopped = True
            self.process.terminate()
            threading.Timer(STOP_WAIT_S, self.process.kill).start()


@dataclass(kw_only=True)
class Head:
    """All that the head knows, in memory alone."""

    folder: Path
    cpus: float
    jobs: dict[str, Job] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(Path(os.environ.get(FOLDER, self.folder)), "cluster")

    def submit(self, wanted: dict[str, Any]) -> bool:
        """Start a process; False where the id is taken."""
        name = wanted["submission_id"]
        with self.lock:
            if name in self.jobs:
                return False
            log = self.folder / f"driver-{name}.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    shlex.split(wanted["entrypoint"]),
                    env={**os.environ, HEAD_PID: str(os.getpid()), **wanted["runtime_env"]["env_vars"]},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.jobs[name] = Job(process=process, log=log)
        self.journal.note("submitted", submission=name, worker_pid=process.pid)
        return True

    def nodes(self) -> dict[str, Any]:
        """The state API's list, which is nested three deep."""
        node = {"state": "ALIVE", "resources_total": {"CPU": self.cpus}}
        return {"data": {"result": {"result": [node]}}}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    head: Head

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/jobs/":
            self._submit(json.loads(body))
            return
        name, what = self._named()
        if name is None or what != "/stop":
            self._answer(404, {"text": "no such thing"})
        elif (job := self.head.jobs.get(name)) is None:
            self._answer(404, {"text": f"Job {name} does not exist"})
        else:
            job.stop()
            self._answer(200, {"stopped": job.stopped})

    def do_GET(self) -> None:
        if self.path.startswith("/api/v0/nodes"):
            self._answer(200, self.head.nodes())
            return
        if asked := _LOG.search(self.path):
            self._log(asked[1], int(asked[2]))
            return
        name, _ = self._named()
        job = self.head.jobs.get(name or "")
        if job is None:
            self._answer(404, {"text": f"Job {name} does not exist"})
        else:
            self._answer(200, {"submission_id": name, "driver_node_id": "n1", **job.status()})

    def _log(self, name: str, num_lines: int) -> None:
        job = self.head.jobs.get(name)
        if job is None:
            self._send(500, b"500: Internal Server Error", "text/plain")
        else:
            lines = job.log.read_bytes().splitlines(keepends=True)
            self._send(200, b"".join(lines[-num_lines:]), "text/plain")

    def _submit(self, wanted: dict[str, Any]) -> None:
        name = wanted["submission_id"]
        if self.head.submit(wanted):
            self._answer(200, {"submission_id": name})
        else:
            # Not 409: the agent says 400, and the head wraps that into a 500.
            self._answer(500, {"text": f"ValueError: Job with submission_id {name} already exists."})

    def _named(self) -> tuple[str | None, str]:
        found = _JOB.search(self.path)
        return (found[1], found[2] or "") if found else (None, "")

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: int, body: bytes, media_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes its port again at once after a kill."""

    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.cluster")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cpus", type=float, required=True)
    given = parser.parse_args()
    Handler.head = Head(folder=given.folder, cpus=given.cpus)
    Server(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
