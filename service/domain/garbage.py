"""What of a job's files may go: checkpoints beyond the retention, what no row names, joined logs. Pure.

Nothing that may go can ever be named again: an attempt that is over is fenced off, and within the
attempt that may still write, a checkpoint is refused below one that is committed. A piece of log may go
because a join, which never goes, holds its lines. So a decision may be carried out late, twice, or only
in part.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

from service.contracts.log_names import LogName

# Everything else below a job's prefix was written for its users and stays.
_ATTEMPT = re.compile(r"attempts/([1-9]\d*)/")
_LOG = re.compile(r"logs/attempt-([1-9]\d*)/([^/]+)")
_CHECKPOINT = re.compile(r"attempts/[1-9]\d*/checkpoints/step-(\d+)/")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which committed checkpoints stay."""

    keep_last: int  # 1 at least: a resume starts from the newest
    keep_every: Fraction | None = None  # steps; beside them the first at or after each multiple


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A committed checkpoint and the files that it names."""

    step: int
    attempt: int
    paths: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class AttemptSeen:
    """One attempt of the job."""

    number: int
    over_since: datetime | None  # None: it may still write
    gone: bool  # the cluster was seen to run it no longer


@dataclass(frozen=True, kw_only=True)
class JobFiles:
    """A job's files as rows name them and as the object store holds them, relative to the job's prefix."""

    attempts: tuple[AttemptSeen, ...]
    checkpoints: tuple[Committed, ...]
    named: frozenset[str]  # finished artifacts, the result's among them
    stored: frozenset[str]  # objects
    uploads: frozenset[str]  # where writes began long ago that have not ended


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What may go, rows before objects."""

    checkpoints: tuple[Committed, ...]
    paths: tuple[str, ...]
    uploads: frozenset[str]
    settled: bool  # once that is gone, these attempts leave nothing more to look for


def garbage(files: JobFiles, retention: Retention | None, *, before: datetime) -> Garbage:
    """All of it. What never was committed goes once its attempt has been over since `before`.

    A retention of None is not known yet and keeps every checkpoint.
    """
    dropped = tuple(expendable(files.checkpoints, retention)) if retention is not None else ()
    kept = set(files.checkpoints) - set(dropped)
    over = ended(files.attempts, before=before)
    unnamed = files.stored - files.named - _paths(kept)
    released = _paths(dropped).union(_joined(files.stored, over))
    newest = _newest_steps(files.checkpoints)
    return Garbage(
        checkpoints=dropped,
        paths=tuple(sorted(path for path in unnamed if path in released or _is_closed(path, over, newest))),
        uploads=frozenset(place for place in files.uploads if _is_abandoned(place, files.attempts, over)),
        settled=all(seen.number in over and seen.gone for seen in files.attempts),
    )


def ended(attempts: Iterable[AttemptSeen], *, before: datetime) -> frozenset[int]:
    """The numbers of the attempts that have been over since `before`."""
    return frozenset(
        seen.number for seen in attempts if seen.over_since is not None and seen.over_since <= before
    )


def expendable(checkpoints: Collection[Committed], retention: Retention) -> Iterator[Committed]:
    """Those that the retention lets go, in order. The last one of each step stands for it."""
    ordered = sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))
    last_of_step = {checkpoint.step: checkpoint for checkpoint in ordered}
    steps = list(last_of_step)
    kept = {*steps[-retention.keep_last :], *_milestones(steps, retention.keep_every)}
    for checkpoint in ordered:
        if checkpoint.step not in kept or checkpoint != last_of_step[checkpoint.step]:
            yield checkpoint


def _milestones(steps: Iterable[int], period: Fraction | None) -> Iterator[int]:
    """Of ascending `steps`, the first at or after each multiple of `period`."""
    if period is None:
        return
    passed = 0  # multiples
    for step in steps:
        multiples = math.floor(step / period)
        if multiples > passed:
            yield step
        passed = multiples


def _paths(checkpoints: Iterable[Committed]) -> frozenset[str]:
    return frozenset().union(*(checkpoint.paths for checkpoint in checkpoints))


def _newest_steps(checkpoints: Iterable[Committed]) -> dict[int, int]:
    """The newest committed step of each attempt."""
    newest: dict[int, int] = {}
    for checkpoint in checkpoints:
        newest[checkpoint.attempt] = max(checkpoint.step, newest.get(checkpoint.attempt, 0))
    return newest


def _joined(paths: Iterable[str], over: Collection[int]) -> Iterator[str]:
    """The pieces of log of these attempts whose lines a join among `paths` holds too."""
    of_source: dict[tuple[str, str], list[tuple[LogName, str]]] = {}
    for path in paths:
        match = _LOG.fullmatch(path)
        name = LogName.parse(match[2]) if match is not None and int(match[1]) in over else None
        if match is not None and name is not None:
            of_source.setdefault((match[1], name.source), []).append((name, path))
    for found in of_source.values():
        reach = -1  # of the joins that begin so far
        for name, path in sorted(found, key=lambda one: (one[0].first, -one[0].last)):
            if name.joins:
                reach = max(reach, name.last)
            elif name.first <= reach:
                yield path


def _is_closed(path: str, over: Collection[int], newest: Mapping[int, int]) -> bool:
    """Whether nothing can name the object any more that no row names now."""
    attempt = _attempt_of(path)
    if attempt is None:
        return False
    match = _CHECKPOINT.match(path)
    return attempt in over or (match is not None and int(match[1]) < newest.get(attempt, 0))


def _is_abandoned(place: str, attempts: Collection[AttemptSeen], over: Collection[int]) -> bool:
    """Whether nobody goes on with an upload: those outside the attempts' own folders may be anyone's."""
    attempt = _attempt_of(f"{place}/")
    return attempt in over if attempt is not None else len(over) == len(attempts)


def _attempt_of(path: str) -> int | None:
    match = _ATTEMPT.match(path)
    return int(match[1]) if match else None
