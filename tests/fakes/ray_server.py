"""Ray's Jobs interface over HTTP, for dispatchers that run as processes of their own.

Behind it is `FakeLauncher`; its odd answers are Ray's: a duplicate is refused with status 500. It
passes the launcher's contract through the real `RayLauncher`.
"""

import asyncio
import json
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from service.dispatch.launcher import Submission
from tests.fakes.launcher import FakeLauncher

_JOB = re.compile(r"/api/jobs/(?P<id>[^/?]+)(?P<what>/stop)?")
_LOG = re.compile(r"/api/v0/logs/file\?node_id=n1&submission_id=(?P<id>[^&]+)&lines=(?P<lines>\d+)")
Answer = tuple[int, Any]


@dataclass
class RayServer:
    """One cluster; `launcher` is where a test looks, and where it lets things happen (`on_call`)."""

    url: str = ""
    launcher: FakeLauncher = field(default_factory=FakeLauncher)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        with self.lock:
            if path.startswith("/api/v0/nodes"):
                return 200, self._nodes()
            if (method, path) == ("POST", "/api/jobs/"):
                return self._submit(json.loads(body))
            if match := _LOG.fullmatch(path):
                return self._log(match["id"], int(match["lines"]))
            match = _JOB.fullmatch(path)
            assert match is not None, f"Ray has no {path}"
            return self._about(match["id"], match["what"])

    def _submit(self, told: dict[str, Any]) -> Answer:
        job_id = told["submission_id"]
        if job_id in self.launcher.jobs:
            return 500, f"ValueError: Job with submission_id {job_id} already exists."
        env = told["runtime_env"]["env_vars"]
        asyncio.run(
            self.launcher.submit(Submission(id=job_id, command=shlex.split(told["entrypoint"]), env=env))
        )
        return 200, {"submission_id": job_id}

    def _log(self, job_id: str, max_lines: int) -> Answer:
        lines = asyncio.run(self.launcher.log_tail(job_id, max_lines=max_lines))
        if job_id not in self.launcher.jobs:
            return 500, "500: Internal Server Error"
        return 200, "".join(f"{line}\n" for line in lines)

    def _about(self, job_id: str, what: str | None) -> Answer:
        job = asyncio.run(self.launcher.status(job_id))
        if job is None:
            return 404, f"Job {job_id} does not exist"
        if what == "/stop":
            asyncio.run(self.launcher.stop(job_id))
            return 200, {"stopped": True}
        told = {"status": job.state.upper(), "message": job.message, "driver_exit_code": job.exit_code}
        return 200, {**told, "driver_node_id": "n1"}

    def _nodes(self) -> dict[str, Any]:
        total = asyncio.run(self.launcher.capacity())
        node = {"state": "ALIVE", "resources_total": {"CPU": total.cpus, "GPU": total.gpus}}
        return {"data": {"result": {"result": [node]}}}


@contextmanager
def ray_server() -> Iterator[RayServer]:
    """A server on a free loopback port."""
    ray = RayServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = ray.answer(method, self.path, body)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    ray.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield ray
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
