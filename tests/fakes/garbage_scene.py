"""Jobs with all kinds of garbage, and looks at what is left of them."""

from datetime import timedelta
from typing import Any

from sqlalchemy import event, select

from service.contracts.allowed import ANYWHERE
from service.contracts.work import Assignment, Checkpoint, StoreAddress
from service.db import queries
from service.db.tables import EventRow
from service.dispatch.garbage import Collector
from service.domain.names import checkpoint_prefix, job_prefix
from service.jobs import garbage, work
from service.jobs.garbage import Pass, Removed
from service.store.base import ObjectStore
from tests.fakes.control_plane import ControlPlane
from tests.fakes.launcher import CrashError
from tests.fakes.stepping_store import SteppingStore
from tests.unit.service.store_contract import Begin

AFTER_S = 3600.0
STORAGE = {"kind": "storage", "message": "refused"}


def collector(plane: ControlPlane) -> Collector:
    """A fresh one: it remembers nothing."""
    return Collector(
        plane.sessions,
        plane.store,
        lease=plane.lease,
        after_s=AFTER_S,
        clock=lambda: plane.now,
        monotonic=lambda: plane.now.timestamp(),
    )


async def dry_run(plane: ControlPlane) -> list[Removed]:
    """What a pass would remove now."""
    look = Pass(now=plane.now, before=plane.now - timedelta(seconds=AFTER_S), deletes=False)
    found = [
        await garbage.sweep_job(plane.sessions, plane.store, job_id, look=look)
        async for job_id in garbage.jobs(plane.sessions)
    ]
    return [removed for removed in found if removed]


async def running(plane: ControlPlane, **changes: Any) -> str:
    """A job whose first attempt has reported."""
    job_id = await plane.submit(**changes)
    await plane.reconciler().run_once()
    await plane.report(job_id, 1)
    return job_id


async def commit(plane: ControlPlane, job_id: str, attempt: int, *steps: int) -> None:
    """Upload and commit checkpoints as a worker does."""
    for step in steps:
        prefix = checkpoint_prefix(attempt, step)
        files = [plane.put(job_id, f"{prefix}/{name}", b"weights") for name in ("state", "manifest.json")]
        await committed(plane, job_id, attempt, Checkpoint(step=step, prefix=prefix, files=files))


async def committed(plane: ControlPlane, job_id: str, attempt: int, told: Checkpoint) -> None:
    """The commit alone."""
    await work.commit_checkpoint(plane.sessions, plane.store, job_id, attempt, told, now=plane.now)


async def failed(plane: ControlPlane, job_id: str, attempt: int) -> None:
    """End an attempt so that another one follows, and start that."""
    await plane.finish(job_id, attempt, outcome="failed", failure=STORAGE)
    plane.advance(60)
    for _ in range(2):
        await plane.reconciler().run_once()
    assert (await plane.job(job_id)).attempt == attempt + 1


async def assigned(plane: ControlPlane, job_id: str, attempt: int) -> Assignment:
    """What the attempt's worker is told."""
    async with plane.sessions.begin() as session:
        store = StoreAddress(url="/x")
        return await work.assignment(session, job_id, attempt, store=store, allowed=ANYWHERE)


async def named(plane: ControlPlane, job_id: str) -> set[str]:
    """The path of every file that a row of the job names."""
    async with plane.sessions.begin() as session:
        rows = await queries.checkpoints(session, job_id)
        paths = {str(entry["path"]) for row in rows for entry in row.files}
        return paths | {row.path for row in await queries.files(session, job_id)}


async def steps(plane: ControlPlane, job_id: str) -> list[int]:
    """Of the committed checkpoints."""
    async with plane.sessions.begin() as session:
        return sorted(row.step for row in await queries.checkpoints(session, job_id))


def stored(plane: ControlPlane, job_id: str) -> set[str]:
    """The path of every object of the job."""
    prefix = job_prefix(job_id)
    return {entry.key.removeprefix(f"{prefix}/") for entry in inner(plane).list(prefix)}


def inner(plane: ControlPlane) -> ObjectStore:
    """The store behind the steps."""
    assert isinstance(plane.store, SteppingStore)
    return plane.store.inner


async def notes(plane: ControlPlane, job_id: str) -> list[str]:
    """What the dispatcher noted of removals."""
    query = select(EventRow.message).where(EventRow.job_id == job_id, EventRow.message.startswith("removed"))
    async with plane.sessions.begin() as session:
        return list(await session.scalars(query.order_by(EventRow.id)))


def logs(attempt: int) -> set[str]:
    """The paths of an attempt's logs: pieces, and a join of two of them."""
    pieces = {f"logs/attempt-{attempt}/rank-0-{number:06d}.jsonl" for number in range(3)}
    return {*pieces, f"logs/attempt-{attempt}/rank-0-000000_000001.jsonl"}


def joined(attempt: int) -> set[str]:
    """Those whose lines the join holds."""
    return {f"logs/attempt-{attempt}/rank-0-{number:06d}.jsonl" for number in range(2)}


def is_log(path: str) -> bool:
    """Whether it lies where logs do."""
    return path.startswith("logs/")


def keep_logs(plane: ControlPlane, job_id: str, attempt: int) -> None:
    """Store them."""
    for path in logs(attempt):
        plane.put(job_id, path, b"line\n")


class Cut:
    """Kills the process at the n-th step: before a commit, a look at the store, or a deletion."""

    def __init__(self, plane: ControlPlane, *, at: int) -> None:
        self.happened, self._left = False, at
        self._plane, self._engine = plane, plane.sessions.kw["bind"].sync_engine

    def __enter__(self) -> "Cut":
        assert isinstance(self._plane.store, SteppingStore)
        self._plane.store.on_step = self._step
        event.listen(self._engine, "commit", self._step)
        return self

    def __exit__(self, *_: object) -> None:
        assert isinstance(self._plane.store, SteppingStore)
        self._plane.store.on_step = lambda: None
        event.remove(self._engine, "commit", self._step)

    def _step(self, *_: object) -> None:
        self._left -= 1
        if self._left < 0 and not self.happened:
            self.happened = True
            raise CrashError


class Scene:
    """A job that goes on in its second attempt, and one that has ended; with all kinds of garbage."""

    live: str
    ended: str
    under_way: frozenset[str]  # of the live attempt

    async def set(self, plane: ControlPlane, begin: Begin) -> "Scene":
        """Let it all happen, long ago but for the live attempt."""
        self.ended = await running(plane)
        await commit(plane, self.ended, 1, 10, 20, 30)
        for path in ("attempts/1/ray/run/snapshot.json", "attempts/1/checkpoints/step-15/state"):
            plane.put(self.ended, path, b"left")
        begin(f"{job_prefix(self.ended)}/encoder/model.safetensors", b"half")
        encoder = plane.put(self.ended, "encoder/model.safetensors", b"encoder")
        keep_logs(plane, self.ended, 1)
        await plane.finish(self.ended, 1, step=30, total_steps=30, files=[encoder.model_dump()])
        self.live = await running(plane)
        await commit(plane, self.live, 1, 10)
        plane.put(self.live, "attempts/1/checkpoints/step-35/state", b"never committed")
        begin(f"{job_prefix(self.live)}/attempts/1/checkpoints/step-35/manifest.json", b"half")
        plane.put(self.live, "spec.json", b"{}")
        keep_logs(plane, self.live, 1)
        await failed(plane, self.live, 1)
        await plane.reconciler().run_once()
        plane.advance(2 * AFTER_S)
        await plane.report(self.live, 2)
        await commit(plane, self.live, 2, 40, 50, 60)
        keep_logs(plane, self.live, 2)
        begin(f"{job_prefix(self.live)}/attempts/2/checkpoints/step-70/state", b"half")
        self.under_way = frozenset({"attempts/2/checkpoints/step-70/manifest.json", "spec.json"})
        plane.put(self.live, "attempts/2/checkpoints/step-70/manifest.json", b"under way")
        return self

    async def assert_whole(self, plane: ControlPlane) -> None:
        """Nothing that a row names is missing, and nothing that is being written."""
        for job_id in (self.live, self.ended):
            assert await named(plane, job_id) <= stored(plane, job_id)
        assert self.under_way <= stored(plane, self.live)

    async def assert_clean(self, plane: ControlPlane) -> None:
        """Nothing else is left."""
        await self.assert_whole(plane)
        assert await steps(plane, self.ended) == [20, 30]
        assert await steps(plane, self.live) == [50, 60]
        ended, live = stored(plane, self.ended), stored(plane, self.live)
        assert {path for path in ended if is_log(path)} == logs(1) - joined(1)
        assert {path for path in live if is_log(path)} == logs(1) - joined(1) | logs(2)
        assert {path for path in ended if not is_log(path)} == await named(plane, self.ended)
        assert {path for path in live if not is_log(path)} == await named(plane, self.live) | self.under_way
        assert "encoder/model.safetensors" in stored(plane, self.ended)
        (upload,) = inner(plane).uploads()
        assert upload.key.startswith(f"{job_prefix(self.live)}/attempts/2/checkpoints/step-70")
        assert [row.clean_attempt for row in (await plane.job(self.ended), await plane.job(self.live))] == [
            1,
            0,
        ]
        assert await notes(plane, self.ended) == ["removed checkpoint at step 10"]
        assert await notes(plane, self.live) == ["removed checkpoints at steps 10, 40"]
