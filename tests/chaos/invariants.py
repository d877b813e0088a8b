"""What must hold of every history, whatever broke meanwhile. Pure; each rule has a test that it can fail."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from service.contracts.jobs import FINAL, JobState
from service.domain.lifecycle import MOVES
from tests.chaos import curve
from tests.chaos.history import TAKEN, Effect, File, Found, History, Job, Sighting
from tests.chaos.log_rules import logs_are_complete
from tests.chaos.wish_rules import (
    cancels_are_honoured,
    failures_are_counted,
    failures_have_a_cause,
    pauses_are_honoured,
    was_retried,
    wishes_are_kept,
)

_FENCE = re.compile(r"attempt (\d+) is starting")
_COMMIT = re.compile(r"attempt (\d+) committed a checkpoint")
_REMOVED = re.compile(r"removed checkpoints? at steps? ([\d, ]+)")
_RUN_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A broken rule."""

    rule: str
    subject: str  # a job's id, an idempotency key, a process
    detail: str


Rule = Callable[[History], Found]


def accepted_jobs_are_not_lost(history: History) -> Found:
    """Every job that a user was promised is there and has come to its end."""
    for job_id in sorted({job for call in history.calls for job in call.jobs}):
        job = history.jobs.get(job_id)
        if job is None:
            yield job_id, "was accepted, and is not in the database"
        elif job.state not in FINAL:
            yield job_id, f"is still {job.state}: {job.reason}"


def nothing_is_made_twice(history: History) -> Found:
    """One key, one answer; one submission, one job; one attempt, one process that was let in."""
    yield from _several(((c.key, c.jobs) for c in history.calls if c.op == "submit" and c.jobs), "made")
    named = ((job.name, job.id) for job in history.jobs.values())
    yield from _several(named, "was submitted once and became")
    let_in = (effect for effect in history.effects if effect.kind == "training")
    trained = ((f"attempt {e.attempt} of {e.job}", e.pid) for e in let_in)
    yield from _several(trained, "was trained by processes")


def _several(pairs: Iterable[tuple[str, object]], verb: str) -> Found:
    """What came with more than one value."""
    values: dict[str, set[object]] = defaultdict(set)
    for subject, value in pairs:
        values[subject].add(value)
    for subject, found in sorted(values.items()):
        if len(found) > 1:
            yield subject, f"{verb} {', '.join(sorted(map(str, found)))}"


def a_key_means_one_spec(history: History) -> Found:
    """The same key with another spec is refused."""
    meant: dict[str, tuple[object, object]] = {}
    for call in sorted(history.calls, key=lambda c: c.answered):
        if call.op != "submit" or not call.jobs:
            continue
        spec = (call.names, call.priorities)
        if meant.setdefault(call.key, spec) != spec:
            yield call.key, "was accepted with two specs"


def stories_are_legal(history: History) -> Found:
    """The events of each job are a path through the table of moves, to exactly one final state."""
    for job in history.jobs.values():
        moves = [event for event in job.events if event.dst is not None]
        state: str | None = None
        for event in moves:
            if event.src != state:
                yield job.id, f"moved from {event.src} to {event.dst} when it was {state}"
            if state is not None and JobState(str(event.dst)) not in MOVES[JobState(state)]:
                yield job.id, f"moved from {state} to {event.dst}"
            if state in FINAL and event.actor != "user":
                yield job.id, f"left its end, {state}, by the {event.actor}"
            state = event.dst
        if not moves or moves[0].src is not None or moves[0].dst != JobState.QUEUED:
            yield job.id, "its story does not begin with queued"
        if state != job.state:
            yield job.id, f"is {job.state}, its last event says {state}"
        reopened = sum(event.src in FINAL and event.actor == "user" for event in moves)
        if sum(event.dst in FINAL for event in moves) > 1 + reopened:
            yield job.id, "came to more than one end"
        if reopened and not was_retried(history, job.id, since=0):
            yield job.id, "left its end, and no user asked for that"


def ends_are_final(history: History) -> Found:
    """Whoever saw a final state sees it for ever; of one that is no success, until a user retries the job."""
    ends: dict[str, Sighting] = {}
    for seen in sorted(history.sightings, key=lambda s: s.at):
        # An answer that was on its way while another one arrived may be older: only ends count.
        if seen.state not in FINAL:
            continue
        end = ends.setdefault(seen.job, seen)
        if seen.state != end.state and not _may_follow(history, end, seen):
            yield seen.job, f"was seen {end.state}, then {seen.state}"
        ends[seen.job] = seen
    for job_id, end in ends.items():
        job = history.jobs.get(job_id)
        if job is None or job.state == end.state:
            continue
        if end.state == JobState.SUCCEEDED or not was_retried(history, job_id, since=end.asked):
            yield job_id, f"was seen {end.state}, and is {job.state}"


def _may_follow(history: History, end: Sighting, seen: Sighting) -> bool:
    """Whether a retry may lie between two answers, the first of which may be the newer one."""
    if end.state == JobState.SUCCEEDED and seen.asked > end.at:
        return False
    return was_retried(history, seen.job, since=min(end.asked, seen.asked), until=seen.at)


def one_attempt_commits(history: History) -> Found:
    """Once a higher attempt was let in, nothing of a lower one is taken."""
    by_job: dict[str, list[Effect]] = defaultdict(list)
    for effect in history.effects:
        by_job[effect.job].append(effect)
    for job_id, effects in by_job.items():
        let_in = [e for e in effects if e.kind in TAKEN or e.kind == "training"]
        for effect in (e for e in effects if e.kind in TAKEN):
            if later := [e for e in let_in if e.attempt > effect.attempt and e.at < effect.sent]:
                yield (
                    job_id,
                    f"attempt {effect.attempt}: {effect.kind} after attempt {later[0].attempt} was let in",
                )
    for job in history.jobs.values():
        yield from _story_keeps_the_fence(job)


def _story_keeps_the_fence(job: Job) -> Found:
    fence, num_commits = 0, 0
    for event in job.events:
        if raised := _FENCE.match(event.message):
            if int(raised[1]) != fence + 1:
                yield job.id, f"the fence rose from {fence} to {raised[1]}"
            fence = int(raised[1])
        if removed := _REMOVED.match(event.message):
            num_commits -= len(removed[1].split(","))
        if committed := _COMMIT.match(event.message):
            num_commits += 1
            if int(committed[1]) != fence:
                yield job.id, f"attempt {committed[1]} committed while the fence was {fence}"
    if num_commits != len(job.checkpoints):
        told = f"its story leaves {num_commits} checkpoints, the table holds {len(job.checkpoints)}"
        yield job.id, told


def curves_are_complete(history: History) -> Found:
    """Every step once, up to the last one of a success, or at least to the last checkpoint of another end."""
    for job in history.jobs.values():
        steps = [step for step, _ in job.points]
        if twice := sorted(step for step, number in Counter(steps).items() if number > 1):
            yield job.id, f"steps {twice} are there twice"
        reached = max((step for _, step in job.checkpoints), default=0)
        wanted = job.total_steps if job.state == JobState.SUCCEEDED else max([reached, *steps])
        if missing := sorted(set(range(1, wanted + 1)) - set(steps)):
            yield job.id, f"a {job.state} job of {wanted} steps lacks steps {missing}"
        if beyond := [step for step in steps if not 1 <= step <= job.total_steps]:
            yield job.id, f"has steps {beyond} of {job.total_steps}"


def curves_are_those_of_uncut_runs(history: History) -> Found:
    """Wherever a run was cut, it went on as if it had not been."""
    for job in history.jobs.values():
        expected = curve.uncut(job.seed, job.total_steps)
        if wrong := [step for step, value in job.points if value != expected.get(step)]:
            yield job.id, f"differs from the uncut run at steps {wrong}"


def successes_were_told(history: History) -> Found:
    """A job succeeds because the worker of its last attempt said so."""
    told = {
        (e.job, e.attempt) for e in history.effects if e.kind == "finish-sent" and e.outcome == "succeeded"
    }
    for job in history.jobs.values():
        if job.state == JobState.SUCCEEDED and (job.id, job.attempt) not in told:
            yield job.id, f"succeeded, which no worker of attempt {job.attempt} said"


def manifests_are_true(history: History) -> Found:
    """Every file that counts is in the store as its manifest says."""
    for job in history.jobs.values():
        yield from _wrong_files(job, job.last_checkpoint, what="its last checkpoint")
        if job.state == JobState.SUCCEEDED:
            yield from _wrong_files(job, job.files, what="its result")
            if "result.json" not in {file.path for file in job.files}:
                yield job.id, "succeeded without a result.json"
    for effect in history.effects:
        if effect.kind != "finish-taken" or effect.outcome != "succeeded" or effect.job not in history.jobs:
            continue
        recorded = {file.path for file in history.jobs[effect.job].files}
        if lost := set(effect.files) - recorded:
            yield effect.job, f"files of the finish are not recorded: {sorted(lost)}"


def _wrong_files(job: Job, files: Sequence[File], *, what: str) -> Found:
    for file in files:
        if file.found is None:
            yield job.id, f"{what} names {file.path}, which is not in the store"
        elif file.found != file.sha256:
            yield job.id, f"{what} names {file.path} with another SHA-256 than the store's"


def nothing_is_left(history: History) -> Found:
    """No process of any attempt outlives its job."""
    for process in history.left:
        yield process, "still runs"


def healthy_jobs_do_not_wait(history: History) -> Found:
    """No job waits for another one's fault: one behind poisonous rows is launched while they are there."""
    for poisoning in history.poisonings:
        if not poisoning.launched:
            yield poisoning.job, f"waited for {poisoning.waited_s:.0f} s behind poison: {poisoning.reason}"


def the_tracker_agrees(history: History) -> Found:
    """One run for each job that ever started, closed, with every point once."""
    if history.runs is None:
        return
    runs: dict[str, list[tuple[str, Sequence[tuple[int, float]]]]] = defaultdict(list)
    for run in history.runs:
        runs[run.job].append((run.status, run.points))
    for job in history.jobs.values():
        found = runs.get(job.id, [])
        if len(found) != (job.attempt > 0):
            yield job.id, f"has {len(found)} runs after {job.attempt} attempts"
            continue
        for status, points in found:
            if status != _RUN_STATUS.get(job.state):
                yield job.id, f"is {job.state}, its run says {status}"
            if sorted(points) != sorted(job.points):
                yield (
                    job.id,
                    f"its run has {len(points)} points, or others, than the {len(job.points)} of the job",
                )


RULES: Sequence[Rule] = (
    accepted_jobs_are_not_lost,
    nothing_is_made_twice,
    a_key_means_one_spec,
    stories_are_legal,
    ends_are_final,
    one_attempt_commits,
    curves_are_complete,
    curves_are_those_of_uncut_runs,
    cancels_are_honoured,
    pauses_are_honoured,
    wishes_are_kept,
    failures_are_counted,
    successes_were_told,
    failures_have_a_cause,
    logs_are_complete,
    manifests_are_true,
    nothing_is_left,
    healthy_jobs_do_not_wait,
    the_tracker_agrees,
)


def check(history: History) -> list[Violation]:
    """Every violation of every rule."""
    return [
        Violation(rule=rule.__name__, subject=subject, detail=detail)
        for rule in RULES
        for subject, detail in rule(history)
    ]
