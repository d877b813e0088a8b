"""The reader beside a slow and obvious one, which takes every piece and sorts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contracts.jobs import JobState, LogLine
from service.contracts.log_names import LogName
from service.db import queries
from service.jobs import logs
from service.jobs.logs import from_cursor, to_cursor
from service.store.base import Entries, Entry, MissingObjectError, ObjectStore
from service.store.directory import DirectoryStore
from tests.fakes.control_plane import ControlPlane, control_plane

START = datetime(2026, 1, 1, tzinfo=UTC)
Span = tuple[int, int]


class Objects(DirectoryStore):
    """Objects in memory, and what was fetched."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def put_bytes(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def list(self, prefix: str = "") -> Entries:
        found = sorted(key for key in self.objects if key.startswith(f"{prefix}/"))
        return [Entry(key, len(self.objects[key])) for key in found]

    def get_bytes(self, key: str) -> bytes:
        self.fetched.append(key.rpartition("/")[2])
        if key not in self.objects:
            raise MissingObjectError(key)
        return self.objects[key]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a process wrote, piece by piece, and what of it lies in the store."""

    stream: str
    pieces: Mapping[int, tuple[int, ...]]  # of each number the seconds of its lines
    joins: tuple[Span, ...] = ()
    removed: frozenset[int] = frozenset()  # pieces
    job_id: str = "J"

    def lines(self, *numbers: int) -> list[LogLine]:
        """Of these pieces."""
        attempt, _, source = self.stream.partition("/")
        return [
            LogLine(
                at=START + timedelta(seconds=second),
                attempt=int(attempt),
                source=source,
                level="info",
                message=f"{number}.{index}",
            )
            for number in numbers
            for index, second in enumerate(self.pieces.get(number, ()))
        ]

    def store(self, store: ObjectStore) -> None:
        """Everything that is there."""
        self.put_pieces(store, self.pieces.keys() - self.removed)
        for span in self.joins:
            self.put(store, span)

    def put_pieces(self, store: ObjectStore, numbers: Iterable[int]) -> None:
        """Each alone."""
        for number in numbers:
            self.put(store, (number, number))

    def put(self, store: ObjectStore, span: Span) -> None:
        """One object."""
        attempt, _, source = self.stream.partition("/")
        name = LogName(source=source, first=span[0], last=span[1])
        lines = self.lines(*range(span[0], span[1] + 1))
        data = "".join(line.model_dump_json() + "\n" for line in lines).encode()
        store.put_bytes(f"jobs/{self.job_id}/logs/attempt-{attempt}/{name}", data)

    def key(self, number: int) -> str:
        """Of a piece."""
        attempt, _, source = self.stream.partition("/")
        return f"jobs/{self.job_id}/logs/attempt-{attempt}/{source}-{number:06d}.jsonl"


def stored(*sources: Source) -> Objects:
    store = Objects()
    for source in sources:
        source.store(store)
    return store


def read(store: ObjectStore, mark: Mapping[str, int] | None = None) -> list[LogLine]:
    """What a reader with this mark is given."""
    return list(logs._merged(store, "J", logs._streams(store, "J", after=mark or {})))


@st.composite
def joins_of(draw: st.DrawFn, numbers: list[int]) -> list[Span]:
    """Spans beside one another."""
    if len(numbers) < 2:
        return []
    cuts = sorted(draw(st.sets(st.sampled_from(numbers), max_size=4)) | {numbers[0], numbers[-1] + 1})
    spans = [(first, after - 1) for first, after in pairwise(cuts) if after - first > 1]
    return [span for span in spans if draw(st.booleans())]


@st.composite
def sources(draw: st.DrawFn, *, stream: str) -> Source:
    first, number = draw(st.integers(0, 2)), draw(st.integers(0, 12))
    numbers = list(range(first, first + number))
    seconds = sorted(draw(st.lists(st.integers(0, 30), max_size=25)))
    cuts = sorted(draw(st.lists(st.integers(0, len(seconds)), min_size=number, max_size=number)))
    ends = [*cuts[:-1], len(seconds)]
    starts = [0, *ends[:-1]]
    pieces = {n: tuple(seconds[a:b]) for n, a, b in zip(numbers, starts, ends, strict=False)}
    joins = draw(joins_of(numbers))
    covered = [n for n in numbers if any(a <= n <= b for a, b in joins)]
    removed = draw(st.sets(st.sampled_from(covered))) if covered else set()
    return Source(stream=stream, pieces=pieces, joins=tuple(joins), removed=frozenset(removed))


STREAMS = ("1/driver", "1/rank-0", "1/rank-10", "2/driver")
JOBS = st.tuples(*(sources(stream=stream) for stream in STREAMS))


def oracle(job: tuple[Source, ...], mark: Mapping[str, int]) -> list[LogLine]:
    """Every line of every piece beyond the mark, by time."""
    beyond = (
        line
        for source in job
        for line in source.lines(*(n for n in sorted(source.pieces) if n > mark.get(source.stream, -1)))
    )
    return sorted(beyond, key=lambda line: line.at)


def names(lines: Iterable[LogLine]) -> set[str]:
    """Each line is another one."""
    return {f"{line.attempt}/{line.source} {line.message}" for line in lines}


@given(job=JOBS)
def test_read__is_every_piece_sorted_however_they_are_joined(job: tuple[Source, ...]) -> None:
    store = stored(*job)
    assert list(logs.read(store, "J")) == oracle(job, {})
    for source in job:
        names = {str(LogName(source="x", first=a, last=b)) for a, b in source.joins}
        apart = [n for n in source.pieces if not any(a <= n <= b for a, b in source.joins)]
        assert len(list(logs._streams(store, "J", after={}).get(source.stream, []))) == len(names) + len(
            apart
        )


@given(job=JOBS, data=st.data())
def test_read__beyond_any_mark_loses_none_and_repeats_only_where_pieces_are_gone(
    job: tuple[Source, ...], data: st.DataObject
) -> None:
    told = data.draw(st.dictionaries(st.sampled_from(STREAMS), st.integers(-1, 14)))
    mark = from_cursor(to_cursor(told))
    found, expected = read(stored(*job), mark), oracle(job, mark)
    for source in job:
        of_source = [line for line in found if f"{line.attempt}/{line.source}" == source.stream]
        last = mark.get(source.stream, -1)
        repeats = [
            a for a, b in source.joins if a <= last < b and source.removed & set(range(last + 1, b + 1))
        ]
        first = min([last + 1, *repeats])
        wanted = oracle((source,), {source.stream: last})
        assert names(wanted) <= names(of_source)
        assert names(of_source) <= names(oracle((source,), {source.stream: first - 1}))
        if not repeats:
            assert of_source == wanted
            assert [line for line in expected if line in of_source] == of_source


@given(job=sources(stream="1/driver"), data=st.data())
def test_read__joins_that_overlap_lose_none(job: Source, data: st.DataObject) -> None:
    number = st.integers(0, 14)
    spans = data.draw(st.lists(st.tuples(number, number).filter(lambda span: span[0] < span[1]), max_size=4))
    covered = [n for n in job.pieces if any(a <= n <= b for a, b in spans)]
    removed = data.draw(st.sets(st.sampled_from(covered))) if covered else set()
    made = Source(stream=job.stream, pieces=job.pieces, joins=tuple(spans), removed=frozenset(removed))
    assert names(read(stored(made))) == names(made.lines(*made.pieces))


def test_mark__inside_a_join_takes_the_pieces_beyond_it() -> None:
    pieces = {n: (n,) for n in range(66)}
    store = stored(Source(stream="1/driver", pieces=pieces, joins=((0, 63),)))
    assert [line.message for line in read(store, {"1/driver": 61})] == ["62.0", "63.0", "64.0", "65.0"]
    assert store.fetched == [f"driver-{n:06d}.jsonl" for n in range(62, 66)]
    store.fetched.clear()
    assert len(read(store)) == 66
    assert store.fetched == ["driver-000000_000063.jsonl", "driver-000064.jsonl", "driver-000065.jsonl"]


@pytest.mark.parametrize("gone_at", [0, 1, 3])
def test_read__a_piece_that_is_removed_meanwhile_is_read_from_its_join(gone_at: int) -> None:
    pieces = {n: (n,) for n in range(6)}
    before = Source(stream="1/driver", pieces=pieces)
    store = stored(before)
    streams = logs._streams(store, "J", after={})
    before.put(store, (0, 3))
    for number in range(gone_at, 4):
        del store.objects[before.key(number)]
    found = [line.message for line in logs._merged(store, "J", streams)]
    assert found == [f"{n}.0" for n in (*range(gone_at), *range(6))]


def test_read__what_is_listed_and_not_there_does_not_go_round_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source(stream="1/driver", pieces={n: (n,) for n in range(4)}, joins=((0, 2),))
    store = stored(source)
    listed = store.list("jobs/J/logs")
    monkeypatch.setattr(store, "list", lambda _prefix: listed)
    store.objects.clear()
    source.put(store, (3, 3))
    assert [line.message for line in read(store)] == ["3.0"]


class Gate(Objects):
    """Tells how many fetches wait at once; lets them through when `expected` of them do."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected, self.open, self.waiting = expected, Event(), 0

    def get_bytes(self, key: str) -> bytes:
        data = super().get_bytes(key)
        if len(self.fetched) >= self.expected:
            self.open.set()
        assert self.open.wait(timeout=60), f"only {len(self.fetched)} objects were fetched at once"
        return data


def test_read__eight_objects_are_fetched_at_once_and_no_more_are_ahead() -> None:
    store = Gate(8)
    Source(stream="1/driver", pieces={n: (n,) for n in range(30)}).store(store)
    lines = logs.read(store, "J")
    assert next(lines).message == "0.0"
    assert len(store.fetched) == 8
    assert next(lines).message == "1.0"
    assert len(store.fetched) <= 9
    assert len(list(lines)) == 28


def test_read__ahead_is_only_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(stream="1/driver", pieces={n: (n,) for n in range(9)})
    other = Source(stream="1/rank-0", pieces={0: (99,)})
    store = stored(source, other)
    size = len(store.objects[source.key(0)])
    monkeypatch.setattr(logs, "_AHEAD_BYTES", 2 * 3 * size)  # for two sources
    lines = logs.read(store, "J")
    next(lines)
    assert sorted(store.fetched) == [*(f"driver-{n:06d}.jsonl" for n in range(3)), "rank-0-000000.jsonl"]
    monkeypatch.setattr(logs, "_AHEAD_BYTES", 1)  # one at a time always fits
    assert len(read(store)) == 10


class Held(Objects):
    """Gives the first pieces; the others once they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = Event()

    def get_bytes(self, key: str) -> bytes:
        data = super().get_bytes(key)
        assert key.endswith("-000000.jsonl") or self.let_go.wait(timeout=60)
        return data


def test_read__a_reader_that_leaves_ends_the_fetches() -> None:
    store = Held()
    for stream in ("1/driver", "1/rank-0"):
        Source(stream=stream, pieces={n: (n,) for n in range(30)}).store(store)
    before = set(enumerate_threads())
    lines = logs.read(store, "J")
    next(lines)
    lines.close()  # type: ignore[attr-defined]
    store.let_go.set()
    for thread in set(enumerate_threads()) - before:
        thread.join(timeout=60)
    assert len(store.fetched) <= 2 + 8


@pytest.mark.parametrize(
    ("told", "mark"),
    [
        ({"1/driver": "jobs/J/logs/attempt-1/driver-000007.jsonl"}, {"1/driver": 7}),  # as releases before
        ({"1/driver": "driver"}, {}),
        ({"1/driver": [7], "1/rank-0": 3}, {"1/rank-0": 3}),
        ([1], {}),
    ],
)
def test_cursor__of_earlier_releases_is_understood_anything_else_is_the_beginning(
    told: Any, mark: dict[str, int]
) -> None:
    assert from_cursor(to_cursor(told)) == mark


@pytest.mark.parametrize("text", [None, "", "x", "%%%", "W1tb" * 3000])
def test_cursor__nonsense_is_the_beginning(text: str | None) -> None:
    assert from_cursor(text) == {}


async def test_follow__across_a_join_each_line_once(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        job_id, store = await plane.submit(), Objects()
        source = Source(stream="1/driver", pieces={n: (n,) for n in range(67)}, job_id=job_id)
        source.put_pieces(store, range(40))
        found, marks = list[str](), list[Mapping[str, int]]()
        async for sent in logs.follow(plane.sessions, store, job_id, after={}, poll_s=0.001):
            found.append(sent.line.message)
            if sent.mark is not None:
                marks.append(sent.mark)
            if len(found) == 40:
                source.put_pieces(store, range(40, 64))
                source.put(store, (0, 63))
            if len(found) == 64:
                for number in range(64):
                    del store.objects[source.key(number)]
                source.put(store, (64, 66))
                await end(plane, job_id)
    assert found == [f"{n}.0" for n in range(67)]
    assert marks == [{"1/driver": 39}, {"1/driver": 63}, {"1/driver": 66}]


async def end(plane: ControlPlane, job_id: str) -> None:
    async with plane.sessions.begin() as session:
        job = await queries.job(session, job_id)
        assert job is not None
        job.state = JobState.SUCCEEDED
