"""Dispatchers as processes: a start after a kill, a place that becomes free, and Ray's own job submission."""

import asyncio
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg

from benchmarks.load import processes
from benchmarks.load.database import for_sqlalchemy, ids_in
from benchmarks.timing import Times
from service.contracts.jobs import FailureKind, JobState
from service.contracts.work import Failure, Finish
from service.db.engine import create_engine, create_sessions
from service.domain.retry import Backoff
from service.jobs.finish import finish
from service.processes import Child
from service.settings import Settings
from service.store.directory import DirectoryStore

_LIMIT_S = 120.0
_LOOK_S = 0.01
_PLACES = Settings.model_fields["max_active_jobs"].default
_TAKEN = JobState.LAUNCHING  # nobody plays a worker, so no job goes further
_FAILED = Finish(outcome="failed", step=0, failure=Failure(kind=FailureKind.USER, message="of the benchmark"))


def restart(uri: str, folder: Path) -> dict[str, float]:
    """Seconds from SIGKILL of api and dispatcher, both started again at once, until each does its work.

    The dispatcher does once it has looked at every job and given a place away that became free meanwhile.
    """
    with ExitStack() as ends:
        cluster = ends.enter_context(processes.cluster(folder))
        killed = _killed(uri, folder, cluster)
        ends.enter_context(processes.dispatcher(uri, folder, cluster=cluster))
        ends.enter_context(processes.api(uri, folder, cluster=cluster))
        answers_s = time.time() - killed
        _until(lambda: _num_taken(uri) == _PLACES, "the place is given away")
        return {"the api answers": answers_s, "a place is given away": time.time() - killed}


def _killed(uri: str, folder: Path, cluster: str) -> float:
    """When api and dispatcher were killed in the middle of their work; one job has ended since."""
    with (
        processes.api(uri, folder, cluster=cluster) as api,
        processes.dispatcher(uri, folder, cluster=cluster) as dispatcher,
    ):
        # It has taken the lease once it gives places away.
        _free_a_place(uri)
        _until(lambda: _num_taken(uri) == _PLACES, "all places are taken")
        for child in (api.child, dispatcher):
            _kill(child)
        killed = time.time()
    _free_a_place(uri)
    return killed


def _free_a_place(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        for job_id in ids_in(uri, _TAKEN)[:1]:
            connection.execute("UPDATE jobs SET state = 'cancelled' WHERE id = %s", [job_id])


def handovers(uri: str, folder: Path, *, rounds: int) -> Times:
    """Seconds from the commit of a job's end, at random moments, until the next job is launched."""
    with processes.cluster(folder) as cluster, processes.dispatcher(uri, folder, cluster=cluster):
        _until(lambda: _num_taken(uri) == _PLACES, "all places are taken")
        return Times(seconds=tuple(asyncio.run(_handovers(uri, folder, rounds))))


async def _handovers(uri: str, folder: Path, rounds: int) -> list[float]:
    engine = create_engine(for_sqlalchemy(uri))
    sessions, store = create_sessions(engine), DirectoryStore(folder)
    moments, seconds, backoff = random.Random(1), [], Backoff(first_s=5, longest_s=300)
    for _ in range(rounds):
        await asyncio.sleep(moments.uniform(1.5, 3.0))
        job_id = ids_in(uri, _TAKEN)[0]
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("UPDATE jobs SET state = 'running' WHERE id = %s", [job_id])
        await finish(sessions, store, job_id, 1, _FAILED, backoff=backoff, now=datetime.now(UTC))
        freed = time.time()
        seconds.append(await asyncio.to_thread(_next_launch, uri, freed) - freed)
    await engine.dispose()
    return seconds


def _next_launch(uri: str, since: float) -> float:
    """When the first job after that moment was launched, by the event's own time."""
    query = "SELECT extract(epoch FROM min(at)) FROM events WHERE dst = 'launching' AND at > to_timestamp(%s)"
    with psycopg.connect(uri, autocommit=True) as connection:
        deadline = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline:
            (found,) = connection.execute(query, [since]).fetchone() or (None,)
            if found is not None:
                return float(found)
            time.sleep(_LOOK_S)
    raise RuntimeError(f"no job was launched within {_LIMIT_S:g} s")


def of_ray(url: str, token: str, *, rounds: int) -> dict[str, Times]:
    """Ray's own: seconds until its Jobs interface has taken a job, and until that is seen to run."""
    taken: list[float] = []
    seen: list[float] = []
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as http:
        for _ in range(rounds):
            began = time.perf_counter()
            answer = http.post("/api/jobs/", json={"entrypoint": "true", "entrypoint_num_cpus": 0})
            address = f"/api/jobs/{answer.raise_for_status().json()['submission_id']}"
            taken.append(time.perf_counter() - began)
            while http.get(address).raise_for_status().json()["status"] == "PENDING":
                time.sleep(_LOOK_S)
            seen.append(time.perf_counter() - began)
    return {"taken": Times(seconds=tuple(taken)), "seen to run": Times(seconds=tuple(seen))}


def _num_taken(uri: str) -> int:
    return len(ids_in(uri, _TAKEN))


def _kill(child: Child) -> None:
    process = child.process()
    assert process is not None, f"{child.name} has ended by itself"
    process.send_signal(signal.SIGKILL)


def _until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {_LIMIT_S:g} s: {what}")
        time.sleep(_LOOK_S)
