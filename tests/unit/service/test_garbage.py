"""What may go, beside a slow and obvious judge of each single file."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.garbage import (
    AttemptSeen,
    Committed,
    Garbage,
    JobFiles,
    Retention,
    expendable,
    garbage,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO, LATELY = NOW - timedelta(hours=2), NOW - timedelta(minutes=1)
BEFORE = NOW - timedelta(hours=1)
NAMES = ("state.safetensors", "manifest.json")
KEEP_ONE = Retention(keep_last=1)


def committed(step: int, attempt: int = 1) -> Committed:
    folder = f"attempts/{attempt}/checkpoints/step-{step}"
    return Committed(step=step, attempt=attempt, paths=frozenset(f"{folder}/{name}" for name in NAMES))


def attempt(number: int, over_since: datetime | None = None, *, gone: bool = True) -> AttemptSeen:
    return AttemptSeen(number=number, over_since=over_since, gone=gone and over_since is not None)


def judged(
    *stored: str,
    attempts: Iterable[AttemptSeen] = (attempt(1),),
    checkpoints: Iterable[Committed] = (),
    named: Iterable[str] = (),
    uploads: Iterable[str] = (),
    retention: Retention | None = KEEP_ONE,
) -> Garbage:
    checkpoints = tuple(checkpoints)
    files = JobFiles(
        attempts=tuple(attempts),
        checkpoints=checkpoints,
        named=frozenset(named),
        stored=frozenset(stored).union(*(checkpoint.paths for checkpoint in checkpoints)),
        uploads=frozenset(uploads),
    )
    return garbage(files, retention, before=BEFORE)


def steps_kept(steps: Iterable[int], *, last: int = 1, every: int | Fraction | None = None) -> list[int]:
    checkpoints = [committed(step) for step in steps]
    period = None if every is None else Fraction(every)
    gone = list(expendable(checkpoints, Retention(keep_last=last, keep_every=period)))
    return [checkpoint.step for checkpoint in checkpoints if checkpoint not in gone]


def test_retention__the_last_ones_stay() -> None:
    assert steps_kept([10, 20, 30, 40], last=2) == [30, 40]
    assert steps_kept([10], last=2) == [10]
    assert steps_kept([], last=2) == []


def test_retention__the_first_at_or_after_each_multiple_stays() -> None:
    assert steps_kept([4, 8, 12, 16, 20, 24, 28], every=10) == [12, 20, 28]
    assert steps_kept([10, 20, 30, 40], every=20) == [20, 40]
    assert steps_kept([5, 35, 36, 50, 51], every=10) == [35, 50, 51]


def test_retention__multiples_are_rounded_one_by_one() -> None:
    # An epoch of 7/2 steps ends after 3.5, 7, 10.5, 14 steps, so the loop saves after 4, 7, 11, 14.
    assert steps_kept([4, 7, 11, 14], every=Fraction(7, 2)) == [4, 7, 11, 14]
    assert steps_kept([4, 7, 11, 14], every=7) == [7, 14]


def test_retention__a_step_committed_twice_is_that_of_the_later_attempt() -> None:
    first, again, newer = committed(10, attempt=1), committed(10, attempt=2), committed(20, attempt=2)
    assert list(expendable([again, first], Retention(keep_last=2))) == [first]
    assert list(expendable([newer, again, first], Retention(keep_last=2))) == [first]
    assert list(expendable([newer, again, first], KEEP_ONE)) == [first, again]


def test_retention__unknown_keeps_all() -> None:
    found = judged(checkpoints=[committed(10), committed(20), committed(30)], retention=None)
    assert (found.checkpoints, found.paths) == ((), ())


@given(
    steps=st.sets(st.integers(0, 60)),
    last=st.integers(1, 4),
    every=st.none() | st.fractions(min_value=1, max_value=30, max_denominator=7),
)
def test_retention__agrees_with_the_obvious_one(steps: set[int], last: int, every: Fraction | None) -> None:
    ordered = sorted(steps)
    expected = set(ordered[-last:])
    multiple = every
    while every is not None and multiple is not None and multiple <= 60:
        expected.update([step for step in ordered if step >= multiple][:1])
        multiple += every
    assert steps_kept(ordered, last=last, every=every) == sorted(expected)


@given(
    steps=st.lists(st.integers(1, 60), unique=True).map(sorted),
    last=st.integers(1, 4),
    every=st.none() | st.fractions(min_value=1, max_value=30, max_denominator=7),
)
def test_retention__a_pass_after_each_commit_keeps_what_one_at_the_end_does(
    steps: list[int], last: int, every: Fraction | None
) -> None:
    present: list[int] = []
    for step in steps:
        present = steps_kept([*present, step], last=last, every=every)
    assert present == steps_kept(steps, last=last, every=every)


def test_live_attempt__an_upload_of_the_next_checkpoint_stays() -> None:
    under_way = "attempts/1/checkpoints/step-30/state.safetensors"
    found = judged(under_way, "attempts/1/ray/run/x.json", checkpoints=[committed(10), committed(20)])
    assert found.checkpoints == (committed(10),)
    assert found.paths == tuple(sorted(committed(10).paths))
    assert not found.settled


def test_live_attempt__what_lies_below_its_newest_checkpoint_can_never_be_committed() -> None:
    left = "attempts/1/checkpoints/step-10/state.safetensors"
    assert judged(left, checkpoints=[committed(20)]).paths == (left,)
    assert judged(left, checkpoints=[committed(10)]).paths == ()
    others = [committed(20, attempt=1)]
    two = [attempt(1, LATELY), attempt(2)]
    assert judged(left.replace("attempts/1", "attempts/2"), attempts=two, checkpoints=others).paths == ()


@pytest.mark.parametrize(("over_since", "goes"), [(None, False), (LATELY, False), (LONG_AGO, True)])
def test_orphans__go_when_their_attempt_has_been_over_for_the_grace(
    over_since: datetime | None, *, goes: bool
) -> None:
    orphans = ("attempts/1/checkpoints/step-30/state.safetensors", "attempts/1/ray/run/x.json")
    found = judged(*orphans, attempts=[attempt(1, over_since)], checkpoints=[committed(20)])
    assert found.paths == (orphans if goes else ())
    assert found.settled == goes


def test_orphans__of_an_attempt_that_no_row_knows_stay() -> None:
    strays = ["attempts/2/checkpoints/step-1/x", "attempts/0/x", "attempts/01/x", "attempts/x", "attempts/1"]
    assert judged(*strays, attempts=[attempt(1, LONG_AGO)]).paths == ()


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "data/report.json",
        "encoder/model.safetensors",
        "logs/attempt-1/driver-000000.jsonl",
        "my/attempts/1/x",
        "result.json",
        "samples/step-1.png",
        "spec.json",
        "tokenizer/config.json",
    ],
)
def test_written_for_users__is_never_garbage(path: str) -> None:
    assert judged(path, attempts=[attempt(1, LONG_AGO)]).paths == ()


def test_logs__a_piece_goes_once_a_join_beside_it_has_its_lines() -> None:
    folder = "logs/attempt-1"
    pieces = [f"{folder}/rank-0-{number:06d}.jsonl" for number in range(5)]
    others = (
        f"{folder}/rank-0-000001_000003.jsonl",
        f"{folder}/rank-1-000002.jsonl",  # another source
        "logs/attempt-2/rank-0-000002.jsonl",  # another attempt
        f"{folder}/rank-0-2.jsonl",
        f"{folder}/deeper/rank-0-000002.jsonl",
        "logs/rank-0-000002.jsonl",
        "attempts/9/rank-0-000002.jsonl",
    )
    both = [attempt(1, LONG_AGO), attempt(2, LONG_AGO)]
    assert judged(*pieces, *others, attempts=both).paths == tuple(pieces[1:4])
    assert judged(*pieces, *others[1:], attempts=both).paths == ()
    assert judged(*pieces, *others, attempts=both, named=[pieces[2]]).paths == (pieces[1], pieces[3])
    nested = (f"{folder}/rank-0-000000_000004.jsonl", f"{folder}/rank-0-000001_000002.jsonl")
    assert judged(*pieces, *nested, attempts=both).paths == tuple(pieces)
    for over_since in (None, LATELY):
        assert judged(*pieces, *others, attempts=[attempt(1, over_since), attempt(2)]).paths == ()


def test_named__stays_wherever_it_lies() -> None:
    dropped, kept = committed(10), committed(20)
    (shared, _) = sorted(dropped.paths)
    kept = Committed(step=20, attempt=1, paths=kept.paths | {shared})
    orphan = "attempts/1/extra"
    found = judged(orphan, attempts=[attempt(1, LONG_AGO)], checkpoints=[dropped, kept], named=[orphan])
    assert found.checkpoints == (dropped,)
    assert set(found.paths) == dropped.paths - {shared}


def test_uploads__go_with_their_attempt_or_with_all() -> None:
    places = ("attempts/1/checkpoints/step-3", "attempts/2/checkpoints/step-3/state", "encoder", "")
    both = [attempt(1, LONG_AGO), attempt(2)]
    assert judged(uploads=places, attempts=both).uploads == {places[0]}
    assert judged(uploads=places, attempts=[attempt(1, LONG_AGO), attempt(2, LATELY)]).uploads == {places[0]}
    assert judged(uploads=places, attempts=[attempt(1, LONG_AGO), attempt(2, LONG_AGO)]).uploads == set(
        places
    )
    assert judged(uploads=["attempts/1"], attempts=[attempt(1, LONG_AGO)]).uploads == {"attempts/1"}


def test_settled__not_before_the_cluster_runs_none_of_them() -> None:
    assert judged(attempts=[attempt(1, LONG_AGO), attempt(2, LONG_AGO)]).settled
    assert not judged(attempts=[attempt(1, LONG_AGO, gone=False), attempt(2, LONG_AGO)]).settled
    assert not judged(attempts=[attempt(1, LONG_AGO), attempt(2, LATELY)]).settled


ATTEMPTS = st.integers(1, 4)
STEPS = st.integers(0, 12)
PATHS = st.builds("attempts/{}/checkpoints/step-{}/{}".format, ATTEMPTS, STEPS, st.sampled_from(NAMES))
LOGS = [
    f"logs/attempt-{number}/{name}.jsonl"
    for number in (1, 2)
    for name in (
        "driver-000000",
        "driver-000001",
        "driver-000002",
        "driver-000000_000001",
        "driver-000001_000002",
        "driver-000000_000002",
    )
]
OTHERS = st.sampled_from(
    ["spec.json", "encoder/x", "attempts/1/ray/a", "attempts/3/ray/b", "logs/attempt-1/x", *LOGS]
)


@st.composite
def job_files(draw: st.DrawFn) -> JobFiles:
    over = [draw(st.sampled_from([LATELY, LONG_AGO])) for _ in range(draw(st.integers(0, 3)))]
    moments = [*over, draw(st.sampled_from([None, LATELY, LONG_AGO]))]
    keys = draw(st.sets(st.tuples(STEPS, st.integers(1, len(moments)))))
    checkpoints = tuple(committed(step, number) for step, number in keys)
    named = draw(st.sets(PATHS | OTHERS, max_size=4))
    stray = draw(st.sets(PATHS | OTHERS, max_size=12))
    return JobFiles(
        attempts=tuple(attempt(number, moment) for number, moment in enumerate(moments, start=1)),
        checkpoints=checkpoints,
        named=frozenset(named),
        stored=frozenset(stray | named).union(*(c.paths for c in checkpoints)),
        uploads=frozenset(draw(st.sets(PATHS | OTHERS, max_size=4))),
    )


RETENTIONS = st.none() | st.builds(
    Retention, keep_last=st.integers(1, 3), keep_every=st.none() | st.integers(1, 6).map(Fraction)
)


def is_joined(path: str, files: JobFiles) -> bool:
    """A piece of log of an attempt that is long over, whose lines another object holds."""
    holders = {
        "driver-000000.jsonl": ["driver-000000_000001.jsonl"],
        "driver-000001.jsonl": ["driver-000000_000001.jsonl", "driver-000001_000002.jsonl"],
        "driver-000002.jsonl": ["driver-000001_000002.jsonl"],
    }
    all_of_them = "driver-000000_000002.jsonl"
    folder, _, name = path.rpartition("/")
    over = {f"logs/attempt-{seen.number}" for seen in files.attempts if seen.over_since == LONG_AGO}
    if folder not in over or name not in holders:
        return False
    return any(f"{folder}/{one}" in files.stored for one in (all_of_them, *holders[name]))


def may_go(path: str, files: JobFiles, dropped: Iterable[Committed]) -> bool:
    """One file, judged by the words of docs/decisions/garbage.md."""
    dropped = list(dropped)
    if path in files.named:
        return False
    if any(path in checkpoint.paths for checkpoint in files.checkpoints if checkpoint not in dropped):
        return False
    if any(path in checkpoint.paths for checkpoint in dropped):
        return True
    parts = path.split("/")
    if parts[0] == "logs":
        return is_joined(path, files)
    if parts[0] != "attempts":
        return False
    for seen in files.attempts:
        if str(seen.number) != parts[1]:
            continue
        if seen.over_since == LONG_AGO:
            return True
        steps = [checkpoint.step for checkpoint in files.checkpoints if checkpoint.attempt == seen.number]
        return parts[2] == "checkpoints" and any(step > int(parts[3].removeprefix("step-")) for step in steps)
    return False


@given(files=job_files(), retention=RETENTIONS)
def test_garbage__agrees_with_the_judge_of_each_file(files: JobFiles, retention: Retention | None) -> None:
    found = garbage(files, retention, before=BEFORE)
    assert set(found.paths) == {path for path in files.stored if may_go(path, files, found.checkpoints)}
    if files.checkpoints:
        newest = max(files.checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))
        assert newest not in found.checkpoints
        assert not newest.paths & set(found.paths)
    assert retention is not None or not found.checkpoints


@given(files=job_files(), retention=RETENTIONS)
def test_garbage__a_second_look_finds_nothing(files: JobFiles, retention: Retention | None) -> None:
    found = garbage(files, retention, before=BEFORE)
    rest = JobFiles(
        attempts=files.attempts,
        checkpoints=tuple(c for c in files.checkpoints if c not in found.checkpoints),
        named=files.named,
        stored=files.stored - set(found.paths),
        uploads=files.uploads - found.uploads,
    )
    again = garbage(rest, retention, before=BEFORE)
    assert (again.checkpoints, again.paths, again.uploads) == ((), (), frozenset())


@given(files=job_files(), retention=RETENTIONS, data=st.data())
def test_garbage__cut_after_the_rows_a_second_look_finds_the_same_objects(
    files: JobFiles, retention: Retention | None, data: st.DataObject
) -> None:
    found = garbage(files, retention, before=BEFORE)
    deleted = set(data.draw(st.sets(st.sampled_from(found.paths)))) if found.paths else set()
    all_over = tuple(attempt(seen.number, LONG_AGO) for seen in files.attempts)
    rest = JobFiles(
        attempts=all_over,
        checkpoints=tuple(c for c in files.checkpoints if c not in found.checkpoints),
        named=files.named,
        stored=files.stored - deleted,
        uploads=files.uploads,
    )
    below = {path for path in found.paths if path.startswith(("attempts/", "logs/"))} - deleted
    assert below <= set(garbage(rest, retention, before=BEFORE).paths)
