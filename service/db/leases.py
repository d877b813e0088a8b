"""Leases: of several dispatchers, one does each task.

Time is the database's alone, so the clocks of the hosts need not agree. Each take-over raises the
token, and whoever writes under a lease shows its token in the same transaction: a holder that slept
while another one took over writes nothing.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, DateTime, Update, func, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Sessions
from service.db.queries import INSERT
from service.db.tables import LeaseRow
from service.db.types import UtcDateTime

RECONCILE, FORWARD, COLLECT = "reconcile", "forward", "garbage"  # the dispatchers' tasks
_LONGEST_DOING = 500  # characters
# As SQLAlchemy stores moments in SQLite, so that text compares like time.
_SQLITE_MOMENT = "%Y-%m-%d %H:%M:%f000"


class LeaseLostError(Exception):
    """The lease ran out or another process has it: drop what was decided under it."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to do one task, as it was given."""

    name: str
    owner: str
    token: int
    lasts_s: float


@dataclass(frozen=True, kw_only=True)
class GuardedSessions:
    """Transactions that commit only while a lease is held."""

    sessions: Sessions
    lease: Lease

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A transaction that holds the lease in place until it ends.

        Raises LeaseLostError, with nothing written, once the lease is no longer ours.
        """
        async with self.sessions.begin() as session:
            await guard(session, self.lease)
            yield session


async def held(session: AsyncSession) -> Sequence[LeaseRow]:
    """The leases that somebody holds now, by name."""
    query = select(LeaseRow).where(LeaseRow.expires_at > _clock(session))
    return (await session.scalars(query.order_by(LeaseRow.name))).all()


async def holder(session: AsyncSession, name: str) -> str | None:
    """Who holds a lease now; unlike `take`, asking locks nothing."""
    query = select(LeaseRow.owner).where(LeaseRow.name == name, LeaseRow.expires_at > _clock(session))
    owner: str | None = await session.scalar(query)
    return owner


async def look(session: AsyncSession, name: str) -> tuple[LeaseRow, datetime] | None:
    """A lease, whether somebody holds it or not, and the database's time; None before its first holder."""
    now = type_coerce(_clock(session), UtcDateTime())
    found = await session.execute(select(LeaseRow, now).where(LeaseRow.name == name))
    row = found.one_or_none()
    return None if row is None else (row[0], row[1])


async def take(session: AsyncSession, name: str, *, owner: str, lasts_s: float) -> Lease | None:
    """Take a lease that nobody holds; None where somebody does.

    It waits for a transaction that is guarded by the lease, however late that is.
    """
    expires_at = _clock(session, plus_s=lasts_s)
    insert = INSERT[session.get_bind().dialect.name](LeaseRow)
    # Of an earlier holder `passed_at` stays: dispatchers that die in every pass make none.
    first = insert.values(
        name=name, owner=owner, token=1, expires_at=expires_at, passed_at=_clock(session), doing=""
    )
    statement = first.on_conflict_do_update(
        index_elements=["name"],
        set_={"owner": owner, "token": LeaseRow.token + 1, "expires_at": expires_at, "doing": ""},
        where=LeaseRow.expires_at <= _clock(session),
    )
    token = await session.scalar(statement.returning(LeaseRow.token))
    return None if token is None else Lease(name=name, owner=owner, token=token, lasts_s=lasts_s)


async def renew(
    session: AsyncSession, lease: Lease, *, passed_s_ago: float | None = None, doing: str = ""
) -> None:
    """Let the lease last its time from now on. Raises LeaseLostError if it is no longer held.

    Args:
        session: In a transaction.
        lease: As it was given.
        passed_s_ago: How many seconds ago a pass under it last came to its end; None for never.
        doing: What it has done since, or why its last pass came to none.
    """
    values: dict[str, Any] = {"expires_at": _clock(session, plus_s=lease.lasts_s)}
    values["doing"] = doing[:_LONGEST_DOING]
    if passed_s_ago is not None:
        values["passed_at"] = _clock(session, plus_s=-passed_s_ago)
    statement = _mine(lease).where(LeaseRow.expires_at > _clock(session)).values(**values)
    if await session.scalar(statement.returning(LeaseRow.token)) is None:
        raise _lost(lease)


async def guard(session: AsyncSession, lease: Lease) -> None:
    """Keep the lease from being taken until the transaction ends. Raises LeaseLostError if it was.

    The row's lock does that on PostgreSQL; on SQLite a writer is alone.
    """
    query = select(LeaseRow.token).where(
        LeaseRow.name == lease.name, LeaseRow.token == lease.token, LeaseRow.expires_at > _clock(session)
    )
    if await session.scalar(query.with_for_update(read=True)) is None:
        raise _lost(lease)


async def release(session: AsyncSession, lease: Lease) -> None:
    """Let the next one take the lease at once. One that is no longer held is left alone."""
    await session.execute(_mine(lease).values(expires_at=_clock(session)))


async def start_anew(session: AsyncSession) -> None:
    """Let every lease be taken at once, and count from now how long no pass came to its end.

    For a caller who knows that no holder lives, and who is about to be the next one.
    """
    now = _clock(session)
    first = INSERT[session.get_bind().dialect.name](LeaseRow).values(
        name=RECONCILE, owner="", token=0, expires_at=now, passed_at=now, doing=""
    )
    await session.execute(first.on_conflict_do_nothing())
    await session.execute(update(LeaseRow).values(expires_at=now, passed_at=now, doing=""))


def _mine(lease: Lease) -> Update:
    # The row stays for ever, so the token of a name never starts again.
    return (
        update(LeaseRow)
        .where(LeaseRow.name == lease.name, LeaseRow.token == lease.token)
        .execution_options(synchronize_session=False)
    )


def _clock(session: AsyncSession, *, plus_s: float = 0.0) -> ColumnElement[datetime]:
    """The database's clock when the statement runs, not when its transaction began."""
    moment = DateTime(timezone=True)
    if session.get_bind().dialect.name == "sqlite":
        return func.strftime(_SQLITE_MOMENT, "now", f"{plus_s:+.3f} seconds", type_=moment)
    return func.clock_timestamp(type_=moment) + timedelta(seconds=plus_s)


def _lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(
        f"lease {lease.name} (token {lease.token}) of {lease.owner} ran out or was taken over"
    )
