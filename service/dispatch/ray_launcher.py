"""Ray Jobs over its REST interface.

Ray refuses a second job of the same id with status 500, which is also its answer when no agent is
there, and a reply may be lost. So after anything but a 200 the job is looked up: found is adopted.
"""

import asyncio
import shlex
from collections.abc import Mapping
from typing import Any

import httpx

from service.dispatch.launcher import LauncherUnavailableError, Submission
from service.domain.decide import ClusterJob, ClusterState
from service.domain.queueing import Needs

# The first job of a fresh head takes seconds: Ray starts its supervisor before it answers.
_TIMEOUT = httpx.Timeout(10.0, read=60.0)
_MAX_NODES = 10_000  # Ray lists no more
_MOST_TAIL_BYTES = 2**16
_MOST_READ_BYTES, _TAIL_LIMIT_S = 2**28, 10.0  # of a log: a line of gigabytes shall not hold up a pass


class RayLauncher:
    """One Ray cluster, reached through its dashboard."""

    def __init__(
        self, url: str, *, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`token` is None where the cluster runs with `RAY_AUTH_MODE=disabled`."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Proxy variables are meant for the outer world, never for the cluster.
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_TIMEOUT, trust_env=False, transport=transport
        )
        self._url = url

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, submission: Submission) -> None:
        """Start a job, or adopt the one that has its id."""
        assert not any("$" in value for value in submission.env.values()), "Ray would expand $NAME in it"
        body = {
            "submission_id": submission.id,
            "entrypoint": shlex.join(submission.command),
            "entrypoint_num_cpus": 0,  # the driver only waits; its workers hold the CPUs
            "runtime_env": {"env_vars": dict(submission.env)},
        }
        try:
            answer = await self._http.post("/api/jobs/", json=body)
            refusal = f"status {answer.status_code}: {_last_line(answer.text)}"
            if answer.is_success:
                return
        except httpx.HTTPError as error:
            refusal = f"{type(error).__name__} {error}".strip()
        if await self.status(submission.id) is None:
            raise LauncherUnavailableError(f"Ray at {self._url} did not take {submission.id}: {refusal}")

    async def status(self, submission_id: str) -> ClusterJob | None:
        """What Ray says of the job; None when it knows none of that id."""
        answer = await self._get(f"/api/jobs/{submission_id}")
        return None if answer is None else _job(answer)

    async def stop(self, submission_id: str) -> None:
        """SIGTERM, then SIGKILL after three seconds; unknown and ended jobs are fine."""
        try:
            answer = await self._http.post(f"/api/jobs/{submission_id}/stop")
        except httpx.HTTPError as error:
            raise self._unavailable(error) from error
        if not answer.is_success and answer.status_code != httpx.codes.NOT_FOUND:
            raise self._unavailable(f"status {answer.status_code}: {_last_line(answer.text)}")

    async def log_tail(self, submission_id: str, *, max_lines: int) -> list[str]:
        """The driver's last lines, as long as its node keeps them; of a flood the last 64 KiB.

        Ray's Jobs interface gives whole logs, through the memory of two of its processes; its state interface
        reads from the end, but has to be told a node, and says 500 where node or file are gone: no log.
        """
        job = await self._get(f"/api/jobs/{submission_id}")
        if job is None or not job.get("driver_node_id"):
            return []
        query = {"node_id": job["driver_node_id"], "submission_id": submission_id, "lines": max_lines}
        return (await self._end_of("/api/v0/logs/file", query)).splitlines()[-max_lines:]

    async def _end_of(self, path: str, query: Mapping[str, str | int]) -> str:
        """The end of what Ray sends, also where it breaks off or does not end; empty where it refuses."""
        tail, length, answered = b"", 0, False
        try:
            async with (
                asyncio.timeout(_TAIL_LIMIT_S),
                self._http.stream("GET", path, params=query) as answer,
            ):
                if not answer.is_success:
                    return ""
                answered = True
                async for part in answer.aiter_bytes():
                    length += len(part)
                    tail = (tail + part)[-_MOST_TAIL_BYTES:]
                    if length > _MOST_READ_BYTES:
                        break
        except (httpx.HTTPError, TimeoutError) as error:
            if not answered:
                raise self._unavailable(error) from error
        cut = "[cut] " if length > len(tail) else ""
        return cut + tail.decode(errors="replace")

    async def capacity(self) -> Needs:
        """CPUs and GPUs of the nodes that are alive."""
        answer = await self._get(f"/api/v0/nodes?detail=true&limit={_MAX_NODES}")
        try:
            nodes = [n for n in answer["data"]["result"]["result"] if n["state"] == "ALIVE"]
            totals = [node["resources_total"] for node in nodes]
            return Needs(
                cpus=sum(float(total.get("CPU", 0)) for total in totals),
                gpus=sum(float(total.get("GPU", 0)) for total in totals),
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self._unavailable(f"cannot read the list of nodes ({error!r})") from error

    async def _get(self, path: str) -> Any:
        """The JSON at `path`, or None for 404."""
        try:
            answer = await self._http.get(path)
            if answer.status_code == httpx.codes.NOT_FOUND:
                return None
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                raise self._unavailable("it refuses the token (set CIM_RAY_TOKEN to the cluster's)")
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, why: object) -> LauncherUnavailableError:
        return LauncherUnavailableError(f"Ray at {self._url} cannot be asked: {why or type(why).__name__}")


def _job(answer: Mapping[str, Any]) -> ClusterJob:
    try:
        state = ClusterState(str(answer["status"]).lower())
    except (KeyError, ValueError) as error:
        raise LauncherUnavailableError(f"Ray reports a job state that we do not know: {error}") from error
    message = str(answer.get("message") or "").splitlines()
    code = answer.get("driver_exit_code")
    return ClusterJob(state=state, message=message[0] if message else "", exit_code=code)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:500] if lines else "no text"
