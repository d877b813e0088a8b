"""The workers' side of the service in memory, alone or behind a small HTTP server.

`AttemptServer` speaks the wire format of `POST /v1/attempts/...`, so that real worker processes can
be driven without the service.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from service.client.errors import StaleAttempt, UnreachableError
from service.contracts.problems import Problem
from service.contracts.tokens import token_fits
from service.contracts.work import Assignment, Checkpoint, Claim, Finish, Report, ReportReply

STALE = Problem(title="Stale", status=409, code="stale_attempt", detail="a newer attempt owns the job")


class FakeWork:
    """One attempt as the service sees it; satisfies what reporter and checkpoint writer ask for."""

    def __init__(self, assignment: Assignment | None = None) -> None:
        self.assigned = assignment
        self.reports: list[Report] = []
        self.checkpoints: list[Checkpoint] = []
        self.finishes: list[Finish] = []
        self.claims: list[str] = []  # codes
        self.token_hash = ""  # of the token that the attempt was claimed with
        self.tokens: set[str] = set()  # shown after the claim
        self.stale = False
        self.away = False
        self.stop_from_step: int | None = None
        self.changed = threading.Condition()

    def claim(self, code: str) -> None:
        self._answer()
        self.claims.append(code)

    def assignment(self) -> Assignment:
        self._answer()
        assert self.assigned is not None
        return self.assigned

    def report(self, report: Report, *, patience_s: float = 0) -> ReportReply:
        self._answer()
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()
        stop = self.stop_from_step is not None and report.progress.step >= self.stop_from_step
        return ReportReply(directive="stop" if stop else "continue")

    def commit_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._answer()
        with self.changed:
            self.checkpoints.append(checkpoint)
            self.changed.notify_all()

    def finish(self, finish: Finish) -> None:
        self._answer()
        self.finishes.append(finish)

    def close(self) -> None:
        """Nothing is open."""

    def metric(self, key: str) -> dict[int, float]:
        """The values of one curve by step, in the order of arrival."""
        points = [point for report in self.reports for point in report.metrics if point.key == key]
        return {point.step: point.value for point in points}

    def wait_for_checkpoint(self, *, timeout_s: float) -> Checkpoint:
        """The first committed checkpoint; AssertionError when none comes."""
        with self.changed:
            arrived = self.changed.wait_for(lambda: bool(self.checkpoints), timeout=timeout_s)
            assert arrived, f"no checkpoint within {timeout_s} s; last report: {self.reports[-1:]}"
            return self.checkpoints[0]

    def _answer(self) -> None:
        if self.away:
            raise UnreachableError("the service is away")
        if self.stale:
            raise StaleAttempt(STALE)


@contextmanager
def serving(work: FakeWork, *, code: str) -> Iterator[str]:
    """`work` behind HTTP on a free port; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(work, code=code))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler_of(work: FakeWork, *, code: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(lambda: work.assignment().model_dump(mode="json"))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(lambda: _take(work, self.path.rsplit("/", 1)[-1], body))

        def log_message(self, *_: Any) -> None:
            """Quiet."""

        def _answer(self, reply: Any) -> None:
            shown = self.headers["Authorization"].removeprefix("Bearer ")
            if self.path.endswith("/claim"):
                may = shown == code
            else:
                may = token_fits(shown, digest=work.token_hash)
                work.tokens.add(shown)
            if not may:
                return self._send(401, {"title": "", "status": 401, "code": "unauthorised", "detail": ""})
            try:
                return self._send(200, reply())
            except StaleAttempt:
                return self._send(409, STALE.model_dump())

        def _send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _take(work: FakeWork, what: str, body: bytes) -> dict[str, Any] | None:
    if what == "claim":
        told = Claim.model_validate_json(body)
        assert work.token_hash in ("", told.token_hash), "a second worker tried to claim the attempt"
        work.token_hash = told.token_hash
    elif what == "report":
        return work.report(Report.model_validate_json(body)).model_dump()
    elif what == "checkpoints":
        work.commit_checkpoint(Checkpoint.model_validate_json(body))
    else:
        work.finish(Finish.model_validate_json(body))
    return None
