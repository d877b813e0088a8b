"""PostgreSQL behind a line that freezes or breaks: everything that waits for it ends in a bounded time.

The limits are small here. A wait without one meets the test's own time-out.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Patience, create_engine
from service.db.upgrade import upgrade
from tests.chaos.proxy import Freeze, Mode, Network, Pass, Proxy, Refuse
from tests.fakes.world import World, open_world

PATIENCE = Patience(pool_s=1, connect_s=2, statement_s=1, answer_s=2)
MORE_THAN_THE_POOL = 40

pytestmark = pytest.mark.timeout(60)


class Line:
    """What lies between the service and its database."""

    def __init__(self, network: Network, proxy: Proxy, database: str) -> None:
        self._network, self._proxy = network, proxy
        url = make_url(database).set(host="127.0.0.1", port=proxy.port, query={"sslmode": "disable"})
        self.url = url.render_as_string(hide_password=False)

    def apply(self, mode: Mode) -> None:
        self._network.apply(self._proxy, mode)


@pytest.fixture
def line(postgres_url: str) -> Iterator[Line]:
    upgrade(postgres_url)
    network = Network()
    server = f"{make_url(postgres_url).query['host']}/.s.PGSQL.5432"
    line = Line(network, network.proxy("database", [server]), postgres_url)
    yield line
    line.apply(Pass())
    line.apply(Refuse())  # so that nothing hangs in it at the end
    network.close()


@pytest.fixture
async def world(line: Line, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(line.url, tmp_path, patience=PATIENCE) as opened:
        yield opened
        line.apply(Pass())


def is_away(answer: httpx.Response, *, codes: Collection[str] = ("database_unavailable",)) -> bool:
    told = answer.json()
    assert answer.status_code == 503, told
    assert told["code"] in codes, told
    return True


@pytest.mark.parametrize("mode", [Freeze(), Refuse()])
async def test_outage__is_a_503_and_ends_without_a_restart(world: World, line: Line, mode: Mode) -> None:
    (before,) = await world.submit(world.tokenizer())
    line.apply(mode)
    assert is_away(await world.client.get("/v1/jobs"))
    assert is_away(await world.client.post("/v1/jobs", json=world.tokenizer("second")))
    assert is_away(await world.client.get("/readyz"))
    line.apply(Pass())
    assert (await world.show(before["id"]))["state"] == "queued"
    await world.submit(world.tokenizer("second"))


async def test_freeze__of_a_line_that_is_being_opened(world: World, line: Line) -> None:
    line.apply(Freeze())
    assert is_away(await world.client.get("/v1/jobs"))
    line.apply(Pass())
    assert (await world.client.get("/v1/jobs")).status_code == 200


async def test_freeze__with_more_requests_than_connections(world: World, line: Line) -> None:
    line.apply(Freeze())
    answers = await asyncio.gather(*(world.client.get("/v1/jobs") for _ in range(MORE_THAN_THE_POOL)))
    # Who got no connection waited for one alone, and was never with the database.
    assert all(is_away(answer, codes=("database_unavailable", "database_busy")) for answer in answers)
    line.apply(Pass())
    answers = await asyncio.gather(*(world.client.get("/v1/jobs") for _ in range(MORE_THAN_THE_POOL)))
    assert {answer.status_code for answer in answers} == {200}


async def test_freeze__in_the_middle_of_a_transaction_says_how_long_it_waited(
    world: World, line: Line
) -> None:
    async with world.sessions() as session:
        await session.execute(text("SELECT 1"))
        line.apply(Freeze())
        with pytest.raises(OperationalError, match="no answer within 2 s"):
            await session.execute(text("SELECT 1"))


async def test_slow_statement__is_ended_and_its_connection_goes_on(world: World) -> None:
    async with world.sessions() as session:
        backend = await session.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(OperationalError, match="statement timeout"):
            await session.execute(text("SELECT pg_sleep(100)"))
        await session.rollback()
        assert await session.scalar(text("SELECT pg_backend_pid()")) == backend


def test_upgrade__has_no_limit_for_a_statement(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(config: Any, _revision: str) -> None:
        connection = config.attributes["connection"]
        seen.append(connection.scalar(text("SHOW statement_timeout")))

    monkeypatch.setattr(command, "upgrade", look)
    upgrade(postgres_url)
    assert seen == ["0"]


async def test_line__is_given_up_by_tcp_too(world: World) -> None:
    async with world.sessions() as session:
        end = await line_of(session)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [end.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [6, 3, 3]


async def line_of(session: AsyncSession) -> socket.socket:
    """The socket that a session talks through."""
    raw = await (await session.connection()).get_raw_connection()
    assert raw.driver_connection is not None
    return socket.socket(fileno=os.dup(raw.driver_connection.fileno()))


async def test_address__may_set_a_limit_by_itself(line: Line) -> None:
    engine = create_engine(f"{line.url}&keepalives_idle=77")
    async with AsyncSession(engine) as session:
        end = await line_of(session)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
    await engine.dispose()
