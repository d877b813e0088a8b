"""Requests at a steady rate, whatever the answers do, over raw connections: a client's own cost stays small.

A request's time begins when it was due, not when it was sent: one that waits behind a slow one is late.
"""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CONNECTIONS = 64


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds of each request that was answered as expected."""

    seconds: tuple[float, ...]
    num_failed: int

    def at(self, share: float) -> float:
        """The time within which that share of the requests was answered (nearest rank)."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def __add__(self, other: "Latencies") -> "Latencies":
        return Latencies(seconds=self.seconds + other.seconds, num_failed=self.num_failed + other.num_failed)


async def post_steadily(url: str, bodies: Sequence[Any], *, rate: float, status: int = 201) -> Latencies:
    """POST each body as JSON, `rate` a second."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    free: asyncio.Queue[_Connection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(_Connection(parts.hostname, parts.port))
    requests = [_request(parts.netloc, parts.path, body) for body in bodies]
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.5
    seconds: list[float] = []

    async def send(number: int, request: bytes) -> None:
        due = began + number / rate
        await asyncio.sleep(due - loop.time())
        connection = await free.get()
        try:
            if await connection.ask(request) == status:
                seconds.append(loop.time() - due)
        finally:
            free.put_nowait(connection)

    await asyncio.gather(*(send(number, request) for number, request in enumerate(requests)))
    while not free.empty():
        free.get_nowait().close()
    return Latencies(seconds=tuple(seconds), num_failed=len(bodies) - len(seconds))


class _Connection:
    """One kept-alive connection, opened when first needed."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """The status of the answer; 0 where there is none."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._address)
            reader, writer = self._streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            return int(head.split(b" ", 2)[1])
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0

    def close(self) -> None:
        """Drop it; the next request opens another one."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def _request(host: str, path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
