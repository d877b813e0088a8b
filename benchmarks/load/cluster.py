"""The part of Ray's Jobs interface that the dispatcher uses, without processes: a job runs until stopped."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_NODE = {"state": "ALIVE", "resources_total": {"CPU": 1_000_000.0}}
_JOBS: dict[str, str] = {}  # its status, by submission


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Nodes, and one job."""
        submission = self.path.removeprefix("/api/jobs/")
        if self.path.startswith("/api/v0/nodes"):
            self._answer(200, {"data": {"result": {"result": [_NODE]}}})
        elif submission in _JOBS:
            self._answer(200, {"status": _JOBS[submission], "message": "", "driver_exit_code": None})
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        """A new job, or the end of one."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.path.endswith("/stop"):
            _JOBS[self.path.split("/")[-2]] = "STOPPED"
        else:
            _JOBS[body["submission_id"]] = "RUNNING"
        self._answer(200, {})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
