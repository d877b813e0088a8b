"""Log lines of a job, from objects that are never rewritten, merged by time.

A source's lines lie in numbered pieces, and once more in joins of many pieces: `service.contracts.log_names`.
"""

import asyncio
import base64
import binascii
import heapq
import json
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from pydantic import ValidationError

from service.contracts.jobs import FINAL, LogLine
from service.contracts.log_names import LogName
from service.db import queries
from service.db.engine import Sessions, only_reads
from service.domain.names import log_prefix
from service.store.base import Entry, MissingObjectError, ObjectStore, below

_LINES_A_TURN = 500  # read in a thread at once
_FETCHES = 8  # at a time; as many objects of a source are fetched ahead
_AHEAD_BYTES = 8 << 20  # fetched ahead, of all sources together

Mark = Mapping[str, int]  # of each stream, "ATTEMPT/SOURCE", the number of the last piece that was read


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A line, and after the last one of a batch where the next batch begins."""

    line: LogLine
    mark: Mark | None = None


def read(store: ObjectStore, job_id: str) -> Iterator[LogLine]:
    """All lines there are, by time. Blocks; holds one object of each source in memory, and 8 MiB beside."""
    return _merged(store, job_id, _streams(store, job_id, after={}))


async def follow(
    sessions: Sessions, store: ObjectStore, job_id: str, *, after: Mark, poll_s: float
) -> AsyncIterator[Sent]:
    """All lines beyond `after`, and those to come, until the job is final and all are told."""
    while True:
        # The state is looked at before the objects: a final job writes no more of them.
        final = await _is_final(sessions, job_id)
        streams = await asyncio.to_thread(_streams, store, job_id, after=after)
        mark = {**after, **{name: objects[-1].name.last for name, objects in streams.items()}}
        lines = _merged(store, job_id, streams)
        batch = await asyncio.to_thread(_take, lines)
        while batch:
            following = await asyncio.to_thread(_take, lines)
            for line in batch[:-1]:
                yield Sent(line=line)
            yield Sent(line=batch[-1], mark=None if following else mark)
            batch = following
        after = mark
        if not streams:
            if final:
                return
            await asyncio.sleep(poll_s)


def to_cursor(mark: Mark) -> str:
    """The mark as an id of a server-sent event."""
    return base64.urlsafe_b64encode(json.dumps(mark).encode()).decode()


def from_cursor(text: str | None) -> Mark:
    """The mark of such an id; what is not one means the beginning, which repeats lines but loses none."""
    try:
        mark = json.loads(base64.urlsafe_b64decode((text or "").encode()))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    told = mark.items() if isinstance(mark, dict) else ()
    return {name: number for name, value in told if (number := _number(value)) is not None}


def _number(value: object) -> int | None:
    """Of the last piece; earlier releases gave its key."""
    if isinstance(value, str):
        name = LogName.parse(value.rpartition("/")[2])
        return name.last if name is not None else None
    return value if isinstance(value, int) else None


def _take(lines: Iterator[LogLine]) -> list[LogLine]:
    return list(islice(lines, _LINES_A_TURN))


async def _is_final(sessions: Sessions, job_id: str) -> bool:
    async with sessions.begin() as session:
        await only_reads(session)
        state = await queries.state(session, job_id)
    return state is None or state in FINAL


@dataclass(frozen=True, kw_only=True)
class _Object:
    """A piece or a join in the store."""

    entry: Entry
    name: LogName


def _streams(store: ObjectStore, job_id: str, *, after: Mark) -> dict[str, list[_Object]]:
    """What to read of each source to have its lines beyond the mark, in order."""
    prefix, found = log_prefix(job_id).rstrip("/"), dict[str, list[_Object]]()
    for entry in store.list(prefix):
        folder, _, text = below(entry.key, prefix).rpartition("/")
        name = LogName.parse(text)
        if name is not None and folder.startswith("attempt-"):
            stream = f"{folder.removeprefix('attempt-')}/{name.source}"
            found.setdefault(stream, []).append(_Object(entry=entry, name=name))
    new = {stream: _beyond(objects, after.get(stream, -1)) for stream, objects in found.items()}
    return {stream: objects for stream, objects in new.items() if objects}


def _beyond(objects: Iterable[_Object], last: int) -> list[_Object]:
    """Every piece beyond number `last`, in joins where that repeats no line.

    A join that begins before is the last resort, where pieces were removed because it holds their lines.
    """
    ahead = deque(sorted(objects, key=lambda found: (found.name.first, -found.name.last)))
    begun: list[_Object] = []  # those that begin at or before `last` and reach beyond it
    chosen = []
    while True:
        while ahead and ahead[0].name.first <= last:
            begun.append(ahead.popleft())
        begun = [found for found in begun if found.name.last > last]
        if ahead and (not begun or ahead[0].name.first == last + 1):
            chosen.append(ahead.popleft())
        elif begun:
            chosen.append(begun[-1])
        else:
            return chosen
        last = chosen[-1].name.last


def _merged(store: ObjectStore, job_id: str, streams: Mapping[str, list[_Object]]) -> Iterator[LogLine]:
    room = _AHEAD_BYTES // max(len(streams), 1)
    pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="logs")
    try:
        reading = _Reading(store=store, job_id=job_id, pool=pool, room=room)
        sources = [reading.lines(stream, objects) for stream, objects in streams.items()]
        yield from heapq.merge(*sources, key=lambda line: line.at)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One reader's fetches."""

    store: ObjectStore
    job_id: str
    pool: ThreadPoolExecutor
    room: int  # bytes that are fetched ahead of each source

    def lines(self, stream: str, objects: list[_Object]) -> Iterator[LogLine]:
        """The lines of a source; what is cut off by a full disk is left out."""
        while objects:
            objects = yield from self._until_one_is_gone(stream, objects)

    def _until_one_is_gone(
        self, stream: str, objects: list[_Object]
    ) -> Generator[LogLine, None, list[_Object]]:
        """The lines up to an object that was removed since the listing; returns what to read instead."""
        for found, data in self._fetched(objects):
            if data is None:
                after = {stream: found.name.first - 1}
                rest = _streams(self.store, self.job_id, after=after).get(stream, [])
                return [one for one in rest if one != found]
            yield from _parsed(data)
        return []

    def _fetched(self, objects: Iterable[_Object]) -> Iterator[tuple[_Object, bytes | None]]:
        """Each object with its bytes, None if it is gone; the next ones are under way meanwhile."""
        ahead, waiting = deque(objects), deque[tuple[_Object, Future[bytes | None]]]()
        while ahead or waiting:
            while ahead and self._has_room([found for found, _ in waiting], ahead[0]):
                waiting.append((ahead[0], self.pool.submit(_bytes, self.store, ahead[0].entry.key)))
                ahead.popleft()
            found, fetch = waiting.popleft()
            yield found, fetch.result()

    def _has_room(self, waiting: list[_Object], found: _Object) -> bool:
        size = sum(one.entry.size for one in (*waiting, found))
        return not waiting or (len(waiting) < _FETCHES and size <= self.room)


def _bytes(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get_bytes(key)
    except MissingObjectError:
        return None


def _parsed(data: bytes) -> Iterator[LogLine]:
    for text in data.splitlines():
        try:
            yield LogLine.model_validate_json(text)
        except ValidationError:
            continue  # cut off by a full disk
