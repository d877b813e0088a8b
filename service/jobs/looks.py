"""Looks at files of this machine on behalf of requests, none of which waits for long.

A folder may hold ten million names, and a network file system that is away answers nobody. The thread of
a look that takes too long goes on by itself, so these threads are few, and nothing else runs in them.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

_MOST_AT_ONCE = 4


class LookTimeoutError(Exception):
    """What was to be seen could not be seen in time; nothing is known of it."""


class Looks:
    """Threads for looks at files. Daemons: a look that hangs does not keep the process from its end."""

    def __init__(self, *, most_at_once: int = _MOST_AT_ONCE) -> None:
        self._free = asyncio.Semaphore(most_at_once)

    async def look(self, work: Callable[[], Found], *, limit_s: float) -> Found:
        """What `work` returns or raises. Raises LookTimeoutError after `limit_s` seconds."""
        if limit_s <= 0:
            raise LookTimeoutError("no time is left to look")
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[Found] = loop.create_future()

        def settle(result: Found | None, error: BaseException | None) -> None:
            self._free.release()
            if seen.done():  # nobody waits any more
                return
            if error is not None:
                seen.set_exception(error)
            else:
                seen.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        try:
            async with asyncio.timeout(limit_s):
                await self._free.acquire()
                threading.Thread(target=run, name="look", daemon=True).start()
                return await seen
        except TimeoutError:
            raise LookTimeoutError(f"nothing was to be seen within {limit_s:g} s") from None
