"""What is let into a JSON column can be queried and read back, and what cannot is not let in."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from service.contracts.storable import UnstorableError, dumps
from service.db.engine import create_engine, create_sessions
from service.db.failures import DatabaseFailure, kind_of
from service.db.tables import JobRow
from tests.fakes.world import World

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_TOO_DEEP: Any = []
for _ in range(100):
    _TOO_DEEP = [_TOO_DEEP]
POISON = [
    float("inf"),
    float("nan"),
    1e308,
    2**64,
    "a\x00b",
    "\ud800",
    {"\x00": 1},
    {1: 2},
    {"a": [b"bytes"]},
    _TOO_DEEP,
]


def is_storable(value: object) -> bool:
    try:
        dumps(value)
    except UnstorableError:
        return False
    return True


def as_floats(tree: Any) -> Any:
    """Every number as a float: PostgreSQL gives 1e20 back as a whole number."""
    if isinstance(tree, dict):
        return {key: as_floats(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_floats(value) for value in tree]
    return float(tree) if isinstance(tree, int | float) and not isinstance(tree, bool) else tree


class JsonContract:
    """On the database of the fixture `database_url`."""

    @pytest.mark.parametrize("value", POISON, ids=lambda value: ascii(value)[:20])
    async def test_write__what_cannot_be_read_back_is_refused_whole(self, world: World, value: Any) -> None:
        (job,) = await world.submit(world.tokenizer())
        with pytest.raises((SQLAlchemyError, UnstorableError)) as refused:
            async with world.sessions.begin() as session:
                await session.execute(update(JobRow).values(reason="half", resolved={"x": value}))
        assert kind_of(refused.value) is DatabaseFailure.DATA
        assert "x" in str(refused.value)
        row = await world.row(job["id"])
        assert (row.reason, "x" in row.resolved) == ("", False)

    async def test_write__what_is_let_in_can_be_queried(self, world: World, database_url: str) -> None:
        (job,) = await world.submit(world.tokenizer())

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(tree=TREES.filter(is_storable))
        def check(tree: Any) -> None:
            whole, part = asyncio.run(_through(database_url, job["id"], tree))
            assert as_floats(whole) == as_floats({"x": tree}), ascii((tree, whole))
            assert (part is None) == (tree is None)  # SQLite gives a part with 15 digits

        await asyncio.to_thread(check)


async def _through(database_url: str, job_id: str, tree: Any) -> tuple[Any, Any]:
    """`tree` written into a row, then read back: as a whole, and by a query for a part of it."""
    engine = create_engine(database_url)
    async with create_sessions(engine).begin() as session:
        mine = JobRow.id == job_id
        await session.execute(update(JobRow).where(mine).values(resolved={"x": tree}))
        whole = await session.scalar(select(JobRow.resolved).where(mine))
        part = await session.scalar(select(JobRow.resolved["x"]).where(mine))
    await engine.dispose()
    return whole, part
