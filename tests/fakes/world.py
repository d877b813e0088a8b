"""The API without a server: real database, real folder, a clock that is set, the parts of others played."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from service.api.app import create_app
from service.contracts.allowed import EVERYTHING
from service.contracts.jobs import JobState
from service.contracts.tokens import claim_code, digest_of
from service.db import moves, queries
from service.db.engine import Patience, Sessions, create_engine, create_sessions
from service.db.tables import AttemptRow, JobRow
from service.domain.names import job_prefix, submission_id
from service.settings import Settings
from service.store.base import ObjectStore
from service.store.directory import DirectoryStore
from tests.fakes.costs import FakeCosts

SECRET = "a secret of at least 32 characters"
Document = dict[str, Any]


def token_of(job_id: str, attempt: int) -> str:
    """What the worker of an attempt has thought up."""
    return f"token of {job_id}/{attempt}"


@dataclass
class Clock:
    """Says what it is told, a millisecond later each time."""

    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


@dataclass
class World:
    """One service, seen from outside, with the dispatcher and the workers played by the test."""

    app: FastAPI
    client: httpx.AsyncClient
    sessions: Sessions
    store: ObjectStore
    images: Path  # a folder with one file
    clock: Clock = field(default_factory=Clock)
    costs: FakeCosts = field(default_factory=FakeCosts)

    def tokenizer(self, name: str = "tok", **changes: Any) -> Document:
        """A sound spec."""
        training = {"steps": 10, "batch_size": 4}
        data = {"uri": str(self.images)}
        return {"kind": "tokenizer", "name": name, "data": data, "training": training, **changes}

    def pretrain(self, name: str = "enc", *, source: str = "job:tok", **changes: Any) -> Document:
        """A sound spec, if `source` is."""
        model = {
            "tokenizer": {"source": source},
            "enhancer": {"name": "vit_tiny_patch16_224"},
            "objective": {"name": "respix"},
        }
        return {**self.tokenizer(name), "kind": "pretrain", "model": model, **changes}

    def evaluate(self, name: str = "eval", *, encoder: str = "job:enc", **changes: Any) -> Document:
        """A sound spec, if `encoder` is."""
        data = {"train": str(self.images), "val": str(self.images)}
        return {"kind": "evaluate", "name": name, "encoder": encoder, "data": data, **changes}

    async def submit(self, *documents: Document) -> list[Document]:
        """Queue jobs that must be accepted."""
        answer = await self.client.post("/v1/jobs", json=list(documents))
        assert answer.status_code == 201, answer.text
        jobs: list[Document] = answer.json()
        return jobs

    async def refused(self, *documents: Document) -> dict[str, str]:
        """Path and message of each mistake of a request that must be refused."""
        answer = await self.client.post("/v1/jobs", json=documents[0] if len(documents) == 1 else documents)
        assert answer.status_code == 422, answer.text
        return {error["path"]: error["message"] for error in answer.json()["errors"]}

    async def show(self, ref: str) -> Document:
        """The job as clients see it."""
        answer = await self.client.get(f"/v1/jobs/{ref}")
        assert answer.status_code == 200, answer.text
        job: Document = answer.json()
        return job

    async def launch(self, job_id: str, *, claimed: bool = True) -> int:
        """Start the next attempt, as the dispatcher does, and claim it; returns its number."""
        async with self.sessions.begin() as session:
            job = await queries.job(session, job_id)
            assert job is not None
            number = job.attempt + 1
            now = self.clock()
            values = {"attempt": number, "not_before": None}
            assert await moves.move(
                session,
                moves.seen(job),
                JobState.LAUNCHING,
                actor="dispatcher",
                message=f"attempt {number}",
                now=now,
                values=values,
            )
            row = AttemptRow(
                job_id=job_id, number=number, submission_id=submission_id(job_id, number), started_at=now
            )
            session.add(row)
        if claimed:
            answer = await self.claim(job_id, number)
            assert answer.status_code == 200, answer.text
        return number

    async def claim(
        self, job_id: str, attempt: int, *, token: str | None = None, code: str | None = None
    ) -> httpx.Response:
        """Speak a worker's first word."""
        token = token or token_of(job_id, attempt)
        code = code or claim_code(SECRET, job_id, attempt)
        body = {"token_hash": digest_of(token)}
        return await self.tell(job_id, attempt, "claim", body, token=code)

    async def put(self, job_id: str, dst: JobState, **values: Any) -> None:
        """Move a job, as the dispatcher does."""
        async with self.sessions.begin() as session:
            job = await queries.job(session, job_id)
            assert job is not None
            seen = moves.seen(job)
            assert await moves.move(
                session, seen, dst, actor="dispatcher", message="test", now=self.clock(), values=values
            )

    async def end_stopped(self, job_id: str, dst: JobState) -> None:
        """End the attempt of a job that was stopping, and move the job, as the dispatcher does."""
        await self.put(job_id, dst)
        async with self.sessions.begin() as session:
            job = await queries.job(session, job_id)
            assert job is not None
            attempt = await queries.attempt(session, job_id, job.attempt)
            assert attempt is not None
            attempt.ended_at, attempt.outcome = self.clock(), "stopped"

    async def row(self, job_id: str) -> JobRow:
        """The job as it is stored."""
        async with self.sessions.begin() as session:
            job = await queries.job(session, job_id)
        assert job is not None
        return job

    async def tell(
        self, job_id: str, attempt: int, what: str, body: Document, *, token: str | None = None
    ) -> httpx.Response:
        """Speak as a worker: `what` is claim, report, checkpoints or finish."""
        shown = f"Bearer {token or token_of(job_id, attempt)}"
        headers = {b"Authorization": shown.encode("latin-1")}
        return await self.client.post(f"/v1/attempts/{job_id}/{attempt}/{what}", json=body, headers=headers)

    async def ask(self, job_id: str, attempt: int) -> httpx.Response:
        """Fetch the assignment as a worker."""
        headers = {"Authorization": f"Bearer {token_of(job_id, attempt)}"}
        return await self.client.get(f"/v1/attempts/{job_id}/{attempt}", headers=headers)

    async def report(self, job_id: str, attempt: int, step: int = 1, **more: Any) -> httpx.Response:
        """Report as a worker."""
        return await self.tell(job_id, attempt, "report", {"progress": {"step": step}, **more})

    async def finish(self, job_id: str, attempt: int, **told: Any) -> None:
        """End an attempt as its worker; that must be accepted."""
        answer = await self.tell(job_id, attempt, "finish", told)
        assert answer.status_code < 300, answer.text

    def file(self, job_id: str, path: str, data: bytes = b"content") -> Document:
        """Store a file and return its line of a manifest."""
        self.store.put_bytes(f"{job_prefix(job_id)}/{path}", data)
        return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@asynccontextmanager
async def open_world(
    database_url: str,
    folder: Path,
    *,
    allowed_storage: str = EVERYTHING,
    store: ObjectStore | None = None,
    patience: Patience | None = None,
) -> AsyncIterator[World]:
    """A world on a migrated database; closed with every connection of it."""
    images = folder / "images"
    images.mkdir()
    (images / "one.png").write_bytes(b"not looked into")
    settings = Settings(
        database_url=database_url,
        store_url=str(folder / "store"),
        ray_url="http://ray.test",
        ray_token=SecretStr("ray-token-SECRET0004"),
        public_url="http://api.test",
        mlflow_url="http://mlflow.test",
        secret=SecretStr(SECRET),
        allowed_storage=allowed_storage,
        shared_filesystem=True,
    )
    engine = create_engine(database_url, patience=patience)
    sessions, clock = create_sessions(engine), Clock()
    store = store or DirectoryStore(folder / "store")
    costs = FakeCosts()
    app = create_app(settings, sessions, store, costs=costs, clock=clock, poll_s=0.01)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api.test") as client:
        yield World(
            app=app, client=client, sessions=sessions, store=store, images=images, clock=clock, costs=costs
        )
    await engine.dispose()
