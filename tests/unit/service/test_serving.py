"""Api and dispatcher in one process, on a real database and a stand-in for Ray."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service import serving
from service.db import leases
from service.db.engine import create_engine, create_sessions
from service.db.leases import COLLECT, FORWARD, RECONCILE
from service.dispatch import observe
from service.jobs import readiness
from service.serving import serve_both
from service.settings import Settings
from tests.fakes.ray_server import ray_server
from tests.fakes.tracker import FakeTracker

PATIENCE_S = 60


async def left_by_a_killed_run(database_url: str) -> None:
    engine = create_engine(database_url)
    async with create_sessions(engine).begin() as session:
        for name in (RECONCILE, FORWARD, COLLECT):
            assert await leases.take(session, name, owner="killed", lasts_s=3600) is not None
    await engine.dispose()


async def owners(url: str) -> dict[str, tuple[str, int]]:
    """Who holds which lease, under which token, as the api tells."""
    async with httpx.AsyncClient(trust_env=False) as client:
        ready: dict[str, Any] = (await client.get(f"{url}/readyz")).json()
    return {lease["name"]: (lease["owner"], lease["token"]) for lease in ready["leases"]}


async def all_owners(url: str) -> dict[str, tuple[str, int]]:
    while True:
        held = await owners(url)
        if len(held) == 3:
            return held
        await asyncio.sleep(0.05)


async def test_both__the_leases_of_a_killed_run_are_not_waited_for(database_url: str, tmp_path: Path) -> None:
    await left_by_a_killed_run(database_url)
    bound, ready, stop = socket.create_server(("127.0.0.1", 0)), asyncio.Event(), asyncio.Event()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with ray_server() as ray:
        settings = Settings(
            database_url=database_url,
            store_url=str(tmp_path / "store"),
            ray_url=ray.url,
            mlflow_url="http://mlflow.test",
            public_url=url,
            secret=SecretStr("s" * 32),
        )
        serving = asyncio.create_task(
            serve_both(settings, bound, stop, open_tracker=lambda _: FakeTracker(), on_ready=ready.set)
        )
        async with asyncio.timeout(PATIENCE_S):
            await ready.wait()
            held = await all_owners(url)
        stop.set()
        await serving
    assert set(held) == {RECONCILE, FORWARD, COLLECT}
    assert {token for _, token in held.values()} == {2}
    assert len({owner for owner, _ in held.values()} - {"killed"}) == 1


async def test_both__says_when_dispatching_stands_still_and_when_it_goes_on(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(readiness, "STANDS_STILL_AFTER_S", 1.0)
    bound, ready, stop = socket.create_server(("127.0.0.1", 0)), asyncio.Event(), asyncio.Event()
    url, told, broken = f"http://127.0.0.1:{bound.getsockname()[1]}", asyncio.Queue[str](), True
    inner = observe.open_jobs

    async def fail(*args: Any, **kwargs: Any) -> observe.Observation:
        if broken:
            raise RuntimeError("a bug")
        return await inner(*args, **kwargs)

    monkeypatch.setattr(observe, "open_jobs", fail)
    with ray_server() as ray:
        settings = Settings(
            database_url=database_url,
            store_url=str(tmp_path / "store"),
            ray_url=ray.url,
            public_url=url,
            secret=SecretStr("s" * 32),
            reconcile_every_s=0.02,
            lease_s=0.8,  # renewed, and so written down, four times as often
        )
        serving_both = asyncio.create_task(
            serve_both(
                settings, bound, stop, open_tracker=no_tracker, on_ready=ready.set, tell=told.put_nowait
            )
        )
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(trust_env=False) as client:
            await ready.wait()
            first = await told.get()
            refused = await client.get(f"{url}/readyz")
            broken = False
            last = await told.get()
            accepted = await client.get(f"{url}/readyz")
            stop.set()
            await serving_both
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    for text in (first, refused.json()["detail"]):
        assert text.startswith("dispatching has stood still for ")
        assert text.endswith(" s: a pass failed: RuntimeError: a bug")
    assert (last, accepted.status_code) == ("dispatching goes on", 200)


def no_tracker(_: Settings) -> FakeTracker:
    raise AssertionError("MLflow is switched off")
