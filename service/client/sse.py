"""Server-sent events, as much of the WHATWG standard (section 9.2) as the service uses."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a stream."""

    event: str
    data: str
    id: str | None  # where to go on after a broken connection


def messages(lines: Iterable[str], *, last_id: str | None = None) -> Iterator[Message]:
    """The events in `lines` (without their line ends). An event that was cut off is dropped.

    An event without an id of its own bears that of the one before; `last_id` is the one to begin with.
    """
    event = "message"
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Message(event, "\n".join(data), last_id)
            event, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            last_id = value
        # Lines that start with a colon keep the connection alive; unknown fields are skipped.
