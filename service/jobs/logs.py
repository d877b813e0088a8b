"""Log lines of a job, from objects that are never rewritten, merged by time."""

import asyncio
import base64
import binascii
import heapq
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from pydantic import ValidationError

from service.contracts.jobs import FINAL, LogLine
from service.db import queries
from service.db.engine import Sessions, only_reads
from service.domain.names import log_prefix
from service.store.base import MissingObjectError, ObjectStore

# jobs/ID/logs/attempt-N/SOURCE-SEQ.jsonl
_KEY = re.compile(r"/attempt-(\d+)/(.+)-(\d+)\.jsonl$")

_LINES_A_TURN = 500  # read in a thread at once

Mark = Mapping[str, str]  # of each stream, "ATTEMPT/SOURCE", the last object that was read


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A line, and after the last one of a batch where the next batch begins."""

    line: LogLine
    mark: Mark | None = None


def read(store: ObjectStore, job_id: str) -> Iterator[LogLine]:
    """All lines there are, by time. Blocks; holds one object of each source in memory."""
    return _merged(store, _streams(store, job_id, after={}))


async def follow(
    sessions: Sessions, store: ObjectStore, job_id: str, *, after: Mark, poll_s: float
) -> AsyncIterator[Sent]:
    """All lines beyond `after`, and those to come, until the job is final and all are told."""
    while True:
        # The state is looked at before the objects: a final job writes no more of them.
        final = await _is_final(sessions, job_id)
        streams = await asyncio.to_thread(_streams, store, job_id, after=after)
        mark = {**after, **{name: keys[-1] for name, keys in streams.items()}}
        lines = _merged(store, streams)
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
    except (binascii.Error, ValueError):
        return {}
    return {str(name): str(key) for name, key in mark.items()} if isinstance(mark, dict) else {}


def _take(lines: Iterator[LogLine]) -> list[LogLine]:
    return list(islice(lines, _LINES_A_TURN))


async def _is_final(sessions: Sessions, job_id: str) -> bool:
    async with sessions.begin() as session:
        await only_reads(session)
        job = await queries.job(session, job_id)
    return job is None or job.state in FINAL


def _streams(store: ObjectStore, job_id: str, *, after: Mark) -> dict[str, list[str]]:
    """The keys of each source's objects beyond the mark, in order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for entry in store.list(log_prefix(job_id).rstrip("/")):
        match = _KEY.search(entry.key)
        if match is not None:
            found.setdefault(f"{match[1]}/{match[2]}", []).append((int(match[3]), entry.key))
    streams = {name: [key for _, key in sorted(keys)] for name, keys in found.items()}
    new = {name: _beyond(keys, after.get(name)) for name, keys in streams.items()}
    return {name: keys for name, keys in new.items() if keys}


def _beyond(keys: list[str], last: str | None) -> list[str]:
    return keys[keys.index(last) + 1 :] if last in keys else keys


def _merged(store: ObjectStore, streams: Mapping[str, list[str]]) -> Iterator[LogLine]:
    return heapq.merge(*(_lines(store, keys) for keys in streams.values()), key=lambda line: line.at)


def _lines(store: ObjectStore, keys: Iterable[str]) -> Iterator[LogLine]:
    for key in keys:
        try:
            data = store.get_bytes(key)
        except MissingObjectError:
            continue  # deleted between the listing and now
        for text in data.splitlines():
            try:
                yield LogLine.model_validate_json(text)
            except ValidationError:
                continue  # cut off by a full disk
