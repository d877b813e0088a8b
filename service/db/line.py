"""The line to PostgreSQL, and how soon it is given up when nothing comes through it any more.

A host that vanishes closes nothing: without the limits here both ends believe in the connection for
as long as TCP does, up to two hours. TCP notices a host that no longer answers at all; a server that is
frozen, or a relay in front of a dead one, still confirms every packet, so each answer has a limit too.
"""

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Any, TypeVar

from psycopg import AsyncConnection, OperationalError
from psycopg.rows import TupleRow
from sqlalchemy import URL

Answer = TypeVar("Answer")

# A silent peer is given up 6 + 3 * 3 = 15 s after its last sign of life, and one that leaves what was
# sent to it unconfirmed after the same time.
_KEEPALIVES = {"keepalives_idle": 6, "keepalives_interval": 3, "keepalives_count": 3}
_UNCONFIRMED_MS = 15_000

# The same at the server's end, which would otherwise keep our connection and its locks.
SERVER_SETTINGS: Mapping[str, int] = {
    **{f"tcp_{name}": value for name, value in _KEEPALIVES.items()},
    "tcp_user_timeout": _UNCONFIRMED_MS,
}


def parameters(url: URL, *, connect_s: float) -> dict[str, int]:
    """Parameters of libpq for a line that is given up in time. What `url` sets by itself is left out."""
    ours = {"connect_timeout": max(2, round(connect_s)), "tcp_user_timeout": _UNCONFIRMED_MS, **_KEEPALIVES}
    return {name: value for name, value in ours.items() if name not in url.query}


async def connect(*args: Any, answer_limit_s: float, **kwargs: Any) -> AsyncConnection[TupleRow]:
    """A connection that is cut when the server leaves a question unanswered for `answer_limit_s`."""
    connection = await LimitedConnection.connect(*args, **kwargs)
    connection.answer_limit_s = answer_limit_s
    return connection


class LimitedConnection(AsyncConnection[TupleRow]):
    """Raises OperationalError, and is closed, when the server does not answer."""

    answer_limit_s: float

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the answer to what was sent.

        The socket is shut down at the end of the time. Cancelling the wait would not do: psycopg then
        asks the server to end the statement, and waits for that as well.
        """
        cut: list[bool] = []
        limit = asyncio.get_running_loop().call_later(self.answer_limit_s, self._cut, cut)
        try:
            return await super().wait(*args, **kwargs)
        except OperationalError as error:
            if not cut:
                raise
            raise OperationalError(f"no answer within {self.answer_limit_s:g} s, connection cut") from error
        finally:
            limit.cancel()

    def _cut(self, cut: list[bool]) -> None:
        cut.append(True)
        with socket.socket(fileno=os.dup(self.pgconn.socket)) as end:
            end.shutdown(socket.SHUT_RDWR)
