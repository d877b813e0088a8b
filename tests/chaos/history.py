"""All that was seen in a campaign: what users were told, what workers did, what is there at the end."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.journal import Fact

Found = Iterator[tuple[str, str]]  # what a rule finds: the subject and what is wrong with it
TAKEN = frozenset({"reported", "checkpoint-taken", "finish-taken"})


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of a user and its answer."""

    op: str  # submit | cancel | pause | resume | retry
    asked: float
    answered: float
    key: str = ""
    names: tuple[str, ...] = ()
    priorities: tuple[int, ...] = ()
    jobs: tuple[str, ...] = ()  # empty: refused, or no answer
    states: tuple[str, ...] = ()
    error: str = ""  # the code of a refusal
    of: str = ""  # the job that a verb was for, whatever came of it


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A job's state as an answer showed it."""

    asked: float  # the answer may be as old as its question
    at: float
    job: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One thing that a worker did."""

    at: float
    kind: str  # begun, training, reported, checkpoint-sent, checkpoint-taken, line, ended ...
    job: str
    attempt: int
    pid: int
    sent: float = 0.0  # when the call began that was taken at `at`
    outcome: str = ""
    files: tuple[str, ...] = ()
    line: str = ""  # of the log
    dead: tuple[int, ...] = ()  # attempts whose lines this worker found waiting, and sent


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a job's story, from the database."""

    src: str | None
    dst: str | None
    actor: str
    message: str


@dataclass(frozen=True, kw_only=True)
class File:
    """What a manifest says, and the SHA-256 of what the store holds: None where it holds nothing."""

    path: str
    sha256: str
    found: str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job at the end."""

    id: str
    name: str
    state: str
    attempt: int = 0
    max_attempts: int = 3
    failure_kind: str | None = None
    reason: str = ""
    seed: int = 0
    total_steps: int = 0
    events: Sequence[Event] = ()
    points: Sequence[tuple[int, float]] = ()  # of the loss, as the API serves them
    checkpoints: Sequence[tuple[int, int]] = ()  # attempt and step of each that was committed
    last_checkpoint: Sequence[File] = ()
    files: Sequence[File] = ()
    # Log lines in their order, by "ATTEMPT/SOURCE": as the API serves them, and left on the workers' disk.
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    waiting: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """Rows that make no sense at the head of the queue, and a healthy job that was submitted behind them."""

    job: str
    launched: bool  # while they were there
    waited_s: float
    reason: str  # that it gave for it


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the tracker shows of a job."""

    job: str
    status: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class History:
    """Everything that the checker judges."""

    calls: Sequence[Call] = ()
    sightings: Sequence[Sighting] = ()
    effects: Sequence[Effect] = ()
    jobs: Mapping[str, Job] = field(default_factory=dict)
    runs: Sequence[Run] | None = None  # None: nothing was recorded in a tracker
    left: Sequence[str] = ()  # processes that still ran when all was over
    poisonings: Sequence[Poisoning] = ()


def calls(facts: Iterable[Fact]) -> list[Call]:
    """What users did."""
    return [
        Call(
            op=fact["op"],
            asked=fact["asked"],
            answered=fact["t"],
            key=fact.get("key", ""),
            names=tuple(fact.get("names", ())),
            priorities=tuple(fact.get("priorities", ())),
            jobs=tuple(fact.get("jobs", ())),
            states=tuple(fact.get("states", ())),
            error=fact.get("error", ""),
            of=fact.get("of", ""),
        )
        for fact in facts
        if fact["kind"] == "call"
    ]


def sightings(facts: Iterable[Fact]) -> list[Sighting]:
    """Every state that an answer showed, in the order of the answers."""
    found = []
    for fact in facts:
        if fact["kind"] == "seen":
            found.append(Sighting(asked=fact["asked"], at=fact["t"], job=fact["job"], state=fact["state"]))
        if fact["kind"] == "call":
            told = zip(fact.get("jobs", ()), fact.get("states", ()), strict=True)
            found += [Sighting(asked=fact["asked"], at=fact["t"], job=job, state=s) for job, s in told]
    return found


def effects(facts: Iterable[Fact]) -> list[Effect]:
    """What workers did."""
    return [_effect(fact) for fact in facts if fact["who"] == "worker"]


def _effect(fact: Mapping[str, Any]) -> Effect:
    return Effect(
        at=fact["t"],
        kind=fact["kind"],
        job=fact["job"],
        attempt=fact["attempt"],
        pid=fact["pid"],
        sent=fact.get("sent", 0.0),
        outcome=fact.get("outcome", ""),
        files=tuple(fact.get("files", ())),
        line=fact.get("line", ""),
        dead=tuple(fact.get("dead", ())),
    )


def poisonings(facts: Iterable[Fact]) -> list[Poisoning]:
    """Every time that rows were poisoned."""
    return [
        Poisoning(
            job=fact["job"],
            launched=fact["launched"],
            waited_s=fact["waited_s"],
            reason=fact["reason"],
        )
        for fact in facts
        if fact["kind"] == "poisoned"
    ]
