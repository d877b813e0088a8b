"""A relay for TCP that can misbehave: the network between two parts of the service, and servers that are ill.

Each proxy listens on one port and passes bytes to one of its targets, in turn, so two targets behind one
proxy are a load balancer. What it does besides is its mode.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
Target = tuple[str, int] | str  # host and port, or the path of a Unix socket
_CHUNK = 65536
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Nothing unusual."""


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """Nobody listens, and what was open is cut."""


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """Connections stay, nothing moves."""


@dataclass(frozen=True, kw_only=True)
class Delay:
    """Each portion arrives later, in both directions."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class LoseReplies:
    """Some answers never arrive, although the request was carried out."""

    share: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """HTTP: requests of these methods get this answer, and never reach the server."""

    status: str
    body: bytes = b""
    methods: tuple[bytes, ...] = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE")


@dataclass(frozen=True, kw_only=True)
class Trip:
    """At the first request that holds `pattern`, `action` is done once, and the connection is cut.

    With `after` the server has carried the request out by then, and its answer is lost.
    """

    pattern: bytes
    after: bool
    action: Callable[[], None] = field(compare=False)


Mode = Pass | Refuse | Freeze | Delay | LoseReplies | Answer | Trip


class Proxy:
    """One port. Everything but `port` and `tripped` belongs to the loop's thread."""

    def __init__(self, name: str, targets: Sequence[Target], *, seed: int = 0) -> None:
        self.name, self._targets, self._random = name, list(targets), Random(seed)
        self.port = 0
        self.tripped = threading.Event()
        self._mode: Mode = Pass()
        self._turn = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def listen(self) -> None:
        """Take connections, on the same port as before if there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def apply(self, mode: Mode) -> None:
        """Change to another mode."""
        before, self._mode = self._mode, mode
        self.tripped.clear()
        if isinstance(mode, Refuse):
            self._unlisten()
        elif isinstance(before, Refuse):
            await self.listen()
        if isinstance(mode, Refuse | Answer):
            self._cut()  # requests on connections that are open already are not looked at
        if isinstance(mode, Freeze):
            self._thawed.clear()
        else:
            self._thawed.set()

    def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._thawed.wait()
            first = b""
            if isinstance(self._mode, Answer):
                first = await self._answered(reader, writer, self._mode)
                if not first:
                    return
            await self._relay(reader, writer, first)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        there, back = await self._connect()
        self._open.add(back)
        passage = Passage()
        try:
            back.write(first)
            up = asyncio.create_task(self._pump(reader, back, passage, self._going_up))
            down = asyncio.create_task(self._pump(there, writer, passage, self._coming_down))
            done, pending = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*done, *pending, return_exceptions=True)
            # What was written before a regular end is still to arrive.
            if not passage.broken:
                with suppress(OSError, TimeoutError):
                    writer.close()
                    await asyncio.wait_for(writer.wait_closed(), 1.0)
        finally:
            self._open.discard(back)
            back.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the next target that takes a connection."""
        for _ in self._targets:
            target = self._targets[self._turn % len(self._targets)]
            self._turn += 1
            try:
                async with asyncio.timeout(_CONNECT_S):
                    if isinstance(target, str):
                        return await asyncio.open_unix_connection(target)
                    return await asyncio.open_connection(*target)
            except (OSError, TimeoutError):
                continue
        raise OSError(f"{self.name}: no target takes a connection")

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        passage: "Passage",
        judge: "Callable[[bytes, Passage], bool]",
    ) -> None:
        while data := await source.read(_CHUNK):
            await self._thawed.wait()
            if isinstance(self._mode, Delay):
                await asyncio.sleep(self._mode.seconds)
            if not judge(data, passage):
                passage.broken = True
                return
            sink.write(data)
            await sink.drain()

    def _going_up(self, data: bytes, passage: "Passage") -> bool:
        passage.asked = True
        if isinstance(self._mode, Trip) and self._mode.pattern in data and not self.tripped.is_set():
            if not self._mode.after:
                self._spring(self._mode)
                return False
            passage.armed = True
        return True

    def _coming_down(self, _data: bytes, passage: "Passage") -> bool:
        if passage.armed and isinstance(self._mode, Trip) and not self.tripped.is_set():
            self._spring(self._mode)
            return False
        asked, passage.asked = passage.asked, False
        lost = asked and isinstance(self._mode, LoseReplies) and self._random.random() < self._mode.share
        return not lost

    def _spring(self, trip: Trip) -> None:
        trip.action()
        self.tripped.set()

    async def _answered(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mode: Answer
    ) -> bytes:
        """Answer one request; or the bytes read so far of one that is to pass."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b" ")
        if method not in mode.methods:
            # This connection ends with its answer, so that the next request is looked at again.
            return head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        length = _LENGTH.search(head)
        if length is not None and b"100-continue" not in rest.lower():
            await reader.readexactly(int(length[1]))
        told = f"HTTP/1.1 {mode.status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        body = b"" if method == b"HEAD" else mode.body
        writer.write(f"{told}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        return b""


@dataclass(kw_only=True)
class Passage:
    """What one connection has seen."""

    asked: bool = False  # something went up since the last answer
    armed: bool = False  # a tripping request went up
    broken: bool = False


class Network:
    """All proxies, on an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def proxy(self, name: str, targets: Sequence[Target], *, seed: int = 0) -> Proxy:
        """A new one, listening."""

        async def made() -> Proxy:
            proxy = Proxy(name, targets, seed=seed)
            await proxy.listen()
            return proxy

        return self._do(made())

    def apply(self, proxy: Proxy, mode: Mode) -> None:
        """Change a proxy's mode."""
        self._do(proxy.apply(mode))

    def close(self) -> None:
        """End the thread, and with it every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)
