"""The service as Python methods. Synchronous; each method is one REST call unless it says more."""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from service.client.downloads import Downloader, OnBytes
from service.client.errors import ApiError
from service.client.follow import follow_stream
from service.client.http import CONNECT_TIMEOUT_S, OUTAGE_PATIENCE_S, Backoff, Transport, parse
from service.contracts.jobs import (
    FINAL,
    EventView,
    FileEntry,
    JobPage,
    JobView,
    LogLine,
    MetricPoint,
    Validation,
)
from service.contracts.problems import Problem
from service.contracts.recipes import Recipe, RecipeSummary

Spec = Mapping[str, Any]

PATIENCE_S = 10.0
ESTIMATE_TIMEOUT_S = 90.0  # the service gives itself a minute for the costs of a request
MOST_POINTS = 100_000  # in one answer of the service


class Client:
    """A client of one service. Safe to use from several threads.

    Args:
        url: Address of the service, e.g. `http://127.0.0.1:8000`.
        timeout_s: For each request.
        token: Sent as a bearer token.
        patience_s: How long calls are repeated while the service is away (broken connection,
            429, 5xx). Every call here is safe to repeat.
        refused_is_final: Raise `RefusedError` at once when no program listens there.
        backoff: Pauses between the tries.
        transport: For tests.

    Every method raises `ApiError`, or its child `UnreachableError` when nothing answered. A job
    (`ref`) is its id, a unique prefix of it, or a name, which means the latest job of that name.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        token: str | None = None,
        patience_s: float = PATIENCE_S,
        refused_is_final: bool = False,
        backoff: Backoff | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._patience_s = patience_s
        self._backoff = backoff or Backoff()
        self._transport = Transport(
            url,
            timeout_s=timeout_s,
            token=token,
            backoff=self._backoff,
            refused_is_final=refused_is_final,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._transport.url

    def submit(self, specs: Spec | Sequence[Spec], *, idempotency_key: str | None = None) -> list[JobView]:
        """Queue one job or several at once; all are accepted or none.

        Args:
            specs: One spec or a list; names in `job:NAME` resolve within the list first.
            idempotency_key: The same key with the same specs means the same jobs. By default each
                call has a key of its own, so that its repetitions make no second job.
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return parse(list[JobView], self._post("/v1/jobs", json=_listed(specs), headers=headers))

    def validate(self, specs: Spec | Sequence[Spec]) -> Validation:
        """The specs with every default filled in, and an estimate; nothing is stored.

        Counting what networks take can last a minute, so this waits longer than other calls.
        """
        timeout = httpx.Timeout(ESTIMATE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return parse(Validation, self._post("/v1/jobs/validate", json=_listed(specs), timeout=timeout))

    def recipes(self) -> list[RecipeSummary]:
        """Every recipe that the service has."""
        return parse(list[RecipeSummary], self._get("/v1/recipes"))

    def recipe(self, name: str) -> Recipe:
        """One recipe, with its file and as a document."""
        return parse(Recipe, self._get(f"/v1/recipes/{quote(name, safe='')}"))

    def jobs(self, *, page_size: int = 100, **filters: str | None) -> Iterator[JobView]:
        """All jobs, newest first: those of `pages`."""
        for page in self.pages(page_size=page_size, **filters):
            yield from page.jobs

    def pages(self, *, page_size: int = 100, **filters: str | None) -> Iterator[JobPage]:
        """All jobs in pages, newest first. A page is fetched as the iterator reaches it.

        Args:
            page_size: Jobs a request.
            filters: Any of `state`, `kind`, `name`, `label` (`key=value`) and `q`.
        """
        query: dict[str, Any] = {key: value for key, value in filters.items() if value is not None}
        query["limit"] = page_size
        while True:
            page = parse(JobPage, self._get("/v1/jobs", params=query))
            yield page
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    def job(self, ref: str) -> JobView:
        """One job."""
        return parse(JobView, self._get(_path(ref)))

    def cancel(self, ref: str) -> JobView:
        """Ask for the job's end. Repeating it is harmless."""
        return parse(JobView, self._post(f"{_path(ref)}/cancel"))

    def pause(self, ref: str) -> JobView:
        """Let the job save a checkpoint and give its workers back. Repeating it is harmless."""
        return parse(JobView, self._post(f"{_path(ref)}/pause"))

    def resume(self, ref: str) -> JobView:
        """Queue a paused job again. Repeating it is harmless."""
        return parse(JobView, self._post(f"{_path(ref)}/resume"))

    def retry(self, ref: str) -> JobView:
        """Queue a failed or cancelled job again, from its last checkpoint. Repeating it is harmless."""
        return parse(JobView, self._post(f"{_path(ref)}/retry"))

    def update(
        self,
        ref: str,
        *,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> JobView:
        """Change what is given; the rest stays as it is."""
        changes = {"priority": priority, "labels": labels, "name": name}
        body = {key: value for key, value in changes.items() if value is not None}
        return parse(JobView, self._call("PATCH", _path(ref), json=body))

    def events(self, ref: str, *, follow: bool = False) -> Iterator[EventView]:
        """What happened to the job, oldest first; `follow` goes on until the job is final."""
        path = f"{_path(ref)}/events"
        if follow:
            return follow_stream(self._transport, path, EventView, backoff=self._backoff)
        return iter(parse(list[EventView], self._get(path)))

    def logs(self, ref: str, *, follow: bool = False) -> Iterator[LogLine]:
        """The job's log lines, oldest first; `follow` goes on until the job is final."""
        path = f"{_path(ref)}/logs"
        if follow:
            return follow_stream(self._transport, path, LogLine, backoff=self._backoff)
        return iter(parse(list[LogLine], self._get(path)))

    def metrics(self, ref: str, *, key: str | None = None) -> list[MetricPoint]:
        """The curves of the job, or one of them, by step. One request for each 100 000 points."""
        query: dict[str, Any] = {} if key is None else {"key": key}
        found: dict[tuple[int, str], MetricPoint] = {}
        while True:
            page = parse(list[MetricPoint], self._get(f"{_path(ref)}/metrics", params=query))
            num_before = len(found)
            found |= {(point.step, point.key): point for point in page}
            if len(page) < MOST_POINTS or len(found) == num_before:
                return list(found.values())
            # The page may end within a step, so that step is asked for again.
            query["after_step"] = page[-1].step - 1

    def artifacts(self, ref: str) -> list[FileEntry]:
        """The job's files."""
        return parse(list[FileEntry], self._get(f"{_path(ref)}/artifacts"))

    def read(self, ref: str, path: str) -> bytes:
        """One of the job's files, in memory."""
        return self._get(f"{_path(ref)}/artifacts/{quote(path)}", params={"redirect": "false"}).content

    def download(
        self, ref: str, prefix: str, folder: Path, *, on_progress: OnBytes | None = None
    ) -> list[Path]:
        """Fetch one file of the job or all below a folder of it; several requests.

        Args:
            ref: The job.
            prefix: A path among `artifacts`, e.g. `encoder`; empty means all of them.
            folder: Local folder; `encoder/config.json` becomes `FOLDER/encoder/config.json`.
                Files that are there already, with the same content, are not fetched again.
            on_progress: Called with (bytes so far, bytes in all).

        Raises:
            CorruptDownloadError: What arrived is not what the job's manifest says.
        """
        files = self.artifacts(ref)
        wanted = [entry for entry in files if _lies_in(entry.path, prefix.strip("/"))]
        if not wanted:
            raise _no_artifact(ref, prefix, files)
        downloader = Downloader(self._transport, patience_s=self._patience_s, on_progress=on_progress)
        return downloader.fetch(wanted, folder, address=f"{_path(ref)}/artifacts")

    def wait(
        self,
        ref: str,
        *,
        on_progress: Callable[[JobView], None] | None = None,
        poll_s: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> JobView:
        """The job once it is final. Outages of up to five minutes are waited through.

        Args:
            ref: The job.
            on_progress: Called with the job after every look at it, the last one included.
            poll_s: Seconds between two looks.
            sleep: For tests.
        """
        ref = self.job(ref).id  # a name may come to mean a newer job meanwhile
        while True:
            view = parse(JobView, self._transport.call("GET", _path(ref), patience_s=OUTAGE_PATIENCE_S))
            if on_progress is not None:
                on_progress(view)
            if view.state in FINAL:
                return view
            sleep(poll_s)

    def _get(self, path: str, **request: Any) -> httpx.Response:
        return self._call("GET", path, **request)

    def _post(self, path: str, **request: Any) -> httpx.Response:
        return self._call("POST", path, **request)

    def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._transport.call(method, path, patience_s=self._patience_s, **request)


def _path(ref: str) -> str:
    return f"/v1/jobs/{quote(ref, safe='')}"


def _listed(specs: Spec | Sequence[Spec]) -> list[Spec]:
    return [specs] if isinstance(specs, Mapping) else list(specs)


def _lies_in(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _no_artifact(ref: str, prefix: str, files: Sequence[FileEntry]) -> ApiError:
    there = ", ".join(sorted({entry.path.split("/")[0] for entry in files})) or "nothing yet"
    detail = (
        f"job {ref} has no artifact {prefix!r}; it has: {there}"
        if prefix
        else f"job {ref} has no artifacts yet"
    )
    return ApiError(Problem(title="Not found", status=404, code="not_found", detail=detail))
