"""Why the database did not do what it was asked: it is away, it is busy, or the statement was at fault.

Only the first two are an outage, which ends a pass and is worth waiting for. What one statement says or
finds that the database cannot bear is told by the driver in the same class of exception (`OperationalError`
is both "connection refused" and "malformed JSON"), so the kind is read from what the driver says by itself.
"""

import sqlite3
from enum import StrEnum

import psycopg
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.contracts.storable import UnstorableError


class DatabaseFailure(StrEnum):
    """Whose fault it is, and so who else it concerns."""

    CONNECTION = "connection"  # the server: away, ending, full, damaged. Everybody
    CONTENTION = "contention"  # others at the same rows, or too many at once. The same again may do
    DATA = "data"  # a value that cannot be stored or read. That statement alone
    PROGRAMMING = "programming"  # a statement that never can work. That statement alone


_CONNECTION, _CONTENTION = DatabaseFailure.CONNECTION, DatabaseFailure.CONTENTION
_DATA, _PROGRAMMING = DatabaseFailure.DATA, DatabaseFailure.PROGRAMMING

# PostgreSQL's codes by their beginning (its documentation, appendix A); the longest that fits counts.
_BY_SQLSTATE = {
    "08": _CONNECTION,  # connection exceptions
    "25006": _CONNECTION,  # read-only: a standby that has not taken over
    "25P03": _CONNECTION,  # idle in a transaction for too long: the session is gone
    "28": _CONNECTION,  # nobody gets in
    "3D": _CONNECTION,  # no such database
    "53": _CONNECTION,  # no room on the disk, in memory, or for a connection
    "57P": _CONNECTION,  # shut down, crashed, starting
    "58": _CONNECTION,  # the system around the server
    "40": _CONTENTION,  # serialization, deadlock
    "55": _CONTENTION,  # a lock that is not to be had
    "57014": _CONTENTION,  # a statement that waited for too long
    "22": _DATA,
    "23": _DATA,  # a constraint
    "54": _DATA,  # larger than the server takes
    "XX001": _DATA,  # a damaged row
}
# SQLite's primary result codes.
_BY_SQLITE_CODE = {
    sqlite3.SQLITE_BUSY: _CONTENTION,
    sqlite3.SQLITE_LOCKED: _CONTENTION,
    sqlite3.SQLITE_INTERRUPT: _CONTENTION,
    sqlite3.SQLITE_PROTOCOL: _CONTENTION,
    sqlite3.SQLITE_PERM: _CONNECTION,
    sqlite3.SQLITE_NOMEM: _CONNECTION,
    sqlite3.SQLITE_READONLY: _CONNECTION,
    sqlite3.SQLITE_IOERR: _CONNECTION,
    sqlite3.SQLITE_CORRUPT: _CONNECTION,
    sqlite3.SQLITE_FULL: _CONNECTION,
    sqlite3.SQLITE_CANTOPEN: _CONNECTION,
    sqlite3.SQLITE_NOTADB: _CONNECTION,
    sqlite3.SQLITE_TOOBIG: _DATA,
    sqlite3.SQLITE_CONSTRAINT: _DATA,
    sqlite3.SQLITE_MISMATCH: _DATA,
}
_SQLITE_PRIMARY = 0xFF  # extended codes have it in their lowest byte
_JSON = "malformed JSON"  # SQLite has no code of its own for it


def kind_of(error: BaseException) -> DatabaseFailure | None:
    """What kind of failure of the database `error` is; None for what has nothing to do with one."""
    if isinstance(error, PoolTimeoutError):
        return _CONTENTION
    if isinstance(error, UnstorableError):  # PostgreSQL's driver writes JSON by itself
        return _DATA
    if isinstance(error, DBAPIError):
        return _CONNECTION if error.connection_invalidated else _of_driver(error)
    if isinstance(error, StatementError):  # a value that could not even be handed to the driver
        return _DATA
    return _PROGRAMMING if isinstance(error, SQLAlchemyError) else None


def is_outage(error: BaseException) -> bool:
    """Whether the next statement would fail as well, whatever it is."""
    return kind_of(error) in (_CONNECTION, _CONTENTION)


def _of_driver(error: DBAPIError) -> DatabaseFailure:
    cause = error.orig
    if isinstance(cause, psycopg.Error) and cause.sqlstate:
        fits = [state for state in _BY_SQLSTATE if cause.sqlstate.startswith(state)]
        return _BY_SQLSTATE[max(fits, key=len)] if fits else _PROGRAMMING
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return _of_sqlite(code & _SQLITE_PRIMARY, str(cause))
    # Raised by the driver itself, without a word of the server's.
    if isinstance(error, OperationalError | InterfaceError):
        return _CONNECTION
    return _DATA if isinstance(error, DataError | IntegrityError) else _PROGRAMMING


def _of_sqlite(code: int, told: str) -> DatabaseFailure:
    if code == sqlite3.SQLITE_ERROR:
        return _DATA if _JSON in told else _PROGRAMMING
    return _BY_SQLITE_CODE.get(code, _PROGRAMMING)
