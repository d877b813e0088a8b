"""The workers' side of the service: one attempt, one token, calls that outlive an outage.

Every call may be repeated: the service takes a report, checkpoint or finish that it already has
as a repetition. So a lost answer costs one more request and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx
from pydantic import BaseModel

from service.client.http import CONNECT_TIMEOUT_S, Backoff, Transport, parse
from service.contracts.jobs import FileEntry
from service.contracts.tokens import digest_of
from service.contracts.work import Assignment, Checkpoint, Claim, Finish, Report, ReportReply

PATIENCE_S = 15 * 60.0
READ_BYTES_A_S = 20e6  # the slowest at which the service reads the files of a manifest from its store


class WorkClient:
    """What the worker of one attempt says to the service.

    Each call is repeated with back-off for `patience_s` seconds while the service is away (refused
    connection, time-out, 429, 5xx).

    Raises (each call):
        StaleAttempt: This attempt may no longer write; end without writing anything more.
        ApiError: The service refused and repeating would not help, or the patience ended; an
            `UnreachableError` when it ended without an answer.
    """

    def __init__(
        self,
        url: str,
        job_id: str,
        attempt: int,
        token: str,
        *,
        timeout_s: float = 30.0,
        backoff: Backoff | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._path = f"/v1/attempts/{job_id}/{attempt}"
        self._claim = Claim(token_hash=digest_of(token))
        self._transport = Transport(
            url, timeout_s=timeout_s, token=token, backoff=backoff, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def claim(self, code: str, *, patience_s: float = PATIENCE_S) -> None:
        """Make `token` the one that speaks for the attempt. The first call of all."""
        shown = {"Authorization": f"Bearer {code}"}
        self._post("claim", self._claim, patience_s=patience_s, headers=shown)

    def assignment(self, *, patience_s: float = PATIENCE_S) -> Assignment:
        """What to do."""
        return parse(Assignment, self._transport.call("GET", self._path, patience_s=patience_s))

    def report(self, report: Report, *, patience_s: float = PATIENCE_S) -> ReportReply:
        """Send progress and metrics; the reply says whether to go on."""
        return parse(ReportReply, self._post("report", report, patience_s=patience_s))

    def commit_checkpoint(self, checkpoint: Checkpoint, *, patience_s: float = PATIENCE_S) -> None:
        """Make a checkpoint, all of whose files are stored, the one to resume from."""
        self._post("checkpoints", checkpoint, patience_s=patience_s, files=checkpoint.files)

    def finish(self, finish: Finish, *, patience_s: float = PATIENCE_S) -> None:
        """Say how the attempt ended."""
        self._post("finish", finish, patience_s=patience_s, files=finish.files)

    def _post(
        self,
        what: str,
        body: BaseModel,
        *,
        patience_s: float,
        headers: Mapping[str, str] | None = None,
        files: Sequence[FileEntry] = (),
    ) -> httpx.Response:
        """Send one call; the answer comes once the service has read `files` from the store."""
        content: Any = body.model_dump_json()
        headers = {"Content-Type": "application/json", **(headers or {})}
        read_s = self._timeout_s + sum(entry.size for entry in files) / READ_BYTES_A_S
        return self._transport.call(
            "POST",
            f"{self._path}/{what}",
            content=content,
            headers=headers,
            timeout=httpx.Timeout(
                self._timeout_s, connect=min(self._timeout_s, CONNECT_TIMEOUT_S), read=read_s
            ),
            patience_s=patience_s,
        )
