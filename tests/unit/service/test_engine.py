"""Connections of SQLite that are cut off in the middle of something."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from service.db import engine as db_engine
from service.db.engine import create_engine, create_sessions


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What lies in a cycle of references stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
async def test_cancelled_in_the_middle_of_a_read__its_transaction_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_engine, "BUSY_TIMEOUT_MS", 100)
    engine = create_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    sessions = create_sessions(engine)
    reading, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        reading.set()
        go_on.wait(30)
        return 1

    @event.listens_for(engine.sync_engine, "connect")
    def add_function(connection: Any, _record: object) -> None:
        connection.run_async(lambda driver: driver.create_function("slow", 0, slow))

    async def read() -> None:
        async with sessions.begin() as session:
            await session.execute(text("SELECT slow() FROM (VALUES (1), (2), (3))"))

    reader = asyncio.create_task(read())
    await asyncio.to_thread(reading.wait, 30)
    reader.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with suppress(asyncio.CancelledError):
        await reader
    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE t (x)"))
    await engine.dispose()
