"""A stream of the service, read as if it never broke."""

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel

from service.client import sse
from service.client.errors import ApiError, UnreachableError
from service.client.http import OUTAGE_PATIENCE_S, Backoff, Transport

M = TypeVar("M", bound=BaseModel)

SILENCE_S = 60.0  # the service says something at least every 15 s
END = "end"  # the event that ends a stream for good


def follow_stream(transport: Transport, path: str, kind: type[M], *, backoff: Backoff) -> Iterator[M]:
    """The items of a stream, which is opened again where it broke until the service ends it.

    Raises:
        ApiError: The service refused, did not answer at first, or not for five minutes later.
    """
    place = _Place()
    connected = False
    broken_at: float | None = None
    while True:
        place.reopened()
        try:
            for message in _messages(transport, path, place.last_id):
                connected, broken_at = True, None
                if message is None:
                    continue
                if message.event == END:
                    return
                if place.is_new(message):
                    yield kind.model_validate_json(message.data)
        except ApiError as error:
            passing = isinstance(error, UnreachableError) or error.status >= 500
            broken_at = backoff.clock() if broken_at is None else broken_at
            if not passing or not connected or backoff.clock() - broken_at > OUTAGE_PATIENCE_S:
                raise
        backoff.sleep(backoff.pause_s(1))


class _Place:
    """Where a stream is: the last id, and what was told since, which a new connection repeats."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._told: Counter[str] = Counter()  # since the last id
        self._seen: Counter[str] = Counter()  # the same, on this connection alone

    def reopened(self) -> None:
        """A connection begins, right after the last id."""
        self._seen.clear()

    def is_new(self, message: sse.Message) -> bool:
        """Whether the message was not told on an earlier connection; goes on past it."""
        self._seen[message.data] += 1
        new = self._seen[message.data] > self._told[message.data]
        self._told[message.data] += new
        if message.id != self.last_id:
            self.last_id = message.id
            self._told.clear()
            self._seen.clear()
        return new


def _messages(transport: Transport, path: str, last_id: str | None) -> Iterator[sse.Message | None]:
    """None once the stream is open, then its events."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
    params = {"follow": "true"}
    with transport.stream(path, headers=headers, params=params, read_timeout_s=SILENCE_S) as response:
        yield None
        yield from sse.messages(response.iter_lines(), last_id=last_id)
