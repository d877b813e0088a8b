"""The use cases against a model, in any order that hypothesis can think of.

The model below is written from docs/lifecycle.md and docs/spec.md, not from the code: plain `if`s over
what a job's user and its workers may have done. After every step it and the service must agree.
"""

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from service.contracts.jobs import JobState as S
from service.domain.lifecycle import MOVES
from tests.fakes.world import Document, World, open_world

FINAL = (S.SUCCEEDED, S.FAILED, S.CANCELLED)
BUSY = (S.LAUNCHING, S.RUNNING, S.STOPPING)
_MOST_KEYS, _MOST_REPEATS = 1, 2  # few jobs, so that each of them sees much
VERBS = ("cancel", "pause", "resume", "retry")


@dataclass
class Job:
    """What should be true of one job."""

    spec: Document
    max_attempts: int
    state: S = S.QUEUED
    wish: str = "run"
    attempt: int = 0
    running: bool = False  # the present attempt may write
    planned: bool = False  # a worker has told how long the training is
    failures: int = 0
    steps: set[int] = field(default_factory=set)  # committed checkpoints
    curve: dict[int, float] = field(default_factory=dict)

    def ask(self, verb: str) -> bool:
        """Whether the verb is allowed; carries it out."""
        if verb == "cancel":
            if self.state not in FINAL:
                self.wish = "cancel"
                self.state = S.STOPPING if self.state in BUSY else S.CANCELLED
            return True
        if self.wish == "cancel" and self.state not in FINAL:
            return False
        if verb == "retry":
            return self._retry()
        if self.state in FINAL:
            return False
        if verb == "pause" and self.wish != "pause":
            self.wish = "pause"
            self.state = S.STOPPING if self.state in BUSY else S.PAUSED
        if verb == "resume" and self.wish == "pause":
            self.wish = "run"
            if self.state == S.PAUSED:
                self.state = S.QUEUED
        return True

    def _retry(self) -> bool:
        if self.state in (S.SUCCEEDED, S.PAUSED, S.STOPPING):
            return False
        if self.state in FINAL:
            self.state, self.wish, self.failures = S.QUEUED, "run", 0
        return True

    def end(self, outcome: str, kind: str) -> None:
        """The attempt's worker said how it ended."""
        self.running = False
        if outcome == "succeeded":
            self.state = S.SUCCEEDED
        elif self.wish == "cancel":
            self.state = S.CANCELLED
        elif outcome == "stopped" and self.state == S.STOPPING:
            self.state = S.PAUSED
        else:
            self.failures += 1
            if (outcome, kind) == ("failed", "user") or self.failures >= self.max_attempts:
                self.state = S.FAILED
            else:
                self.state = S.PAUSED if self.state == S.STOPPING else S.RETRYING


class JobMachine(RuleBasedStateMachine):
    """Users, the dispatcher and workers, old ones among them, at one service."""

    world: ClassVar[World]
    runner: ClassVar[asyncio.Runner]
    num_machines: ClassVar[int] = 0

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        JobMachine.num_machines += 1
        self.tag = f"m{JobMachine.num_machines}"
        self.model: dict[str, Job] = {}
        self.repeats = 0
        self.made_by: dict[str, tuple[Document, str]] = {}  # idempotency key to spec and job

    def call(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """Status and body of a request."""
        answer = self.runner.run(self.world.client.request(method, path, **more))
        assert answer.status_code < 500, answer.text
        return answer.status_code, answer.json() if answer.content else None

    def tell(self, job_id: str, attempt: int, what: str, body: Document) -> tuple[int, Any]:
        """Speak as a worker."""
        answer = self.runner.run(self.world.tell(job_id, attempt, what, body))
        assert answer.status_code < 500, answer.text
        return answer.status_code, answer.json() if answer.content else None

    @initialize(target=jobs)
    def first(self) -> str:
        return self.submit(key=None, max_attempts=2, again=False)

    @precondition(lambda self: len(self.made_by) < _MOST_KEYS or self.repeats < _MOST_REPEATS)
    @rule(target=jobs, key=st.just("a"), max_attempts=st.integers(1, 2), again=st.booleans())
    def submit_with_key(self, key: str, max_attempts: int, *, again: bool) -> str:
        return self.submit(key=f"{self.tag}-{key}", max_attempts=max_attempts, again=again)

    def submit(self, *, key: str | None, max_attempts: int, again: bool) -> str:
        """Submit; `again` sends what the key has made before once more. Returns a job's id."""
        spec = self.world.tokenizer(self.tag, retries={"max_attempts": max_attempts})
        made = self.made_by.get(key or "")
        self.repeats += made is not None
        if made is not None and again:
            spec = made[0]
        headers = {"Idempotency-Key": key} if key else {}
        status, body = self.call("POST", "/v1/jobs", json=spec, headers=headers)
        if made is not None:
            assert status == (200 if spec == made[0] else 409)
            assert status == 409 or body["id"] == made[1]
            return made[1]
        assert status == 201
        self.model[body["id"]] = Job(spec=spec, max_attempts=max_attempts)
        if key:
            self.made_by[key] = (spec, body["id"])
        return str(body["id"])

    @rule(job_id=jobs, verb=st.sampled_from(VERBS))
    def ask(self, job_id: str, verb: str) -> None:
        status, _ = self.call("POST", f"/v1/jobs/{job_id}/{verb}")
        assert status == (202 if self.model[job_id].ask(verb) else 409)

    @rule(job_id=jobs)
    def dispatch(self, job_id: str) -> None:
        """What the dispatcher does next with a job whose last attempt is gone from the cluster."""
        job = self.model[job_id]
        if job.state in (S.QUEUED, S.RETRYING):
            assert self.runner.run(self.world.launch(job_id)) == job.attempt + 1
            job.attempt, job.state, job.running = job.attempt + 1, S.LAUNCHING, True
        elif job.state == S.STOPPING:
            job.state = S.CANCELLED if job.wish == "cancel" else S.PAUSED
            job.running = False
            self.runner.run(self.world.end_stopped(job_id, job.state))
        elif job.state == S.PAUSED and job.wish == "run":
            job.state = S.QUEUED
            self.runner.run(self.world.put(job_id, S.QUEUED))

    def may_write(self, job_id: str, attempt: int) -> bool:
        """Whether the fence lets this attempt through."""
        job = self.model[job_id]
        return attempt == job.attempt and job.running

    @rule(job_id=jobs, back=st.integers(0, 1), step=st.integers(1, 9))
    def report(self, job_id: str, back: int, step: int) -> None:
        job = self.model[job_id]
        attempt = job.attempt - back
        if attempt < 1:
            return
        value = attempt + step / 10
        point = {"step": step, "key": "loss", "value": value}
        body = {"progress": {"step": step}, "metrics": [point], "plan": {"total_steps": 10}}
        status, told = self.tell(job_id, attempt, "report", body)
        if not self.may_write(job_id, attempt):
            assert (status, told["code"]) == (409, "stale_attempt")
            return
        assert (status, told["directive"]) == (200, "stop" if job.state == S.STOPPING else "continue")
        job.curve[step], job.planned = value, True
        if job.state == S.LAUNCHING:
            job.state = S.RUNNING

    @rule(job_id=jobs, back=st.integers(0, 1))
    def commit(self, job_id: str, back: int) -> None:
        job = self.model[job_id]
        attempt, step = job.attempt - back, max(job.steps, default=0) + 1
        if attempt < 1:
            return
        prefix = f"attempts/{attempt}/checkpoints/step-{step}"
        files = [self.world.file(job_id, f"{prefix}/manifest.json")]
        body = {"step": step, "prefix": prefix, "files": files}
        status, told = self.tell(job_id, attempt, "checkpoints", body)
        if self.may_write(job_id, attempt):
            assert status < 300, told
            job.steps.add(step)
        else:
            assert (status, told["code"]) == (409, "stale_attempt")

    @rule(
        job_id=jobs,
        back=st.integers(0, 1),
        outcome=st.sampled_from(["succeeded", "failed", "stopped"]),
        kind=st.sampled_from(["user", "infrastructure", "storage"]),
    )
    def finish(self, job_id: str, back: int, outcome: str, kind: str) -> None:
        job = self.model[job_id]
        attempt = job.attempt - back
        if attempt < 1:
            return
        body: Document = {"outcome": outcome, "step": 10, "total_steps": 10}
        if outcome == "succeeded":
            body["files"] = [self.world.file(job_id, "result.json")]
        if outcome == "failed":
            body["failure"] = {"kind": kind, "message": "because"}
        status, told = self.tell(job_id, attempt, "finish", body)
        if self.may_write(job_id, attempt) and outcome == "succeeded" and not job.planned:
            assert (status, told["code"]) == (409, "broken_manifest")
        elif self.may_write(job_id, attempt):
            assert status < 300, told
            job.end(outcome, kind)
        elif status >= 300:  # else a repetition of what ended that attempt, which changes nothing
            assert (status, told["code"]) == (409, "stale_attempt")

    @rule(
        job_id=jobs, outcome=st.sampled_from(["failed", "stopped"]), kind=st.sampled_from(["user", "storage"])
    )
    def whole_attempt(self, job_id: str, outcome: str, kind: str) -> None:
        """From the start to the end at once: rare otherwise, where every rule is as likely."""
        self.dispatch(job_id)
        self.report(job_id, back=0, step=1)
        self.finish(job_id, back=0, outcome=outcome, kind=kind)

    @invariant()
    def agrees(self) -> None:
        for job_id, job in self.model.items():
            _, shown = self.call("GET", f"/v1/jobs/{job_id}")
            note(f"{job_id}: {job}")
            assert (shown["state"], shown["desired"]) == (job.state, job.wish)
            assert len(shown["attempts"]) == job.attempt
            assert (shown["finished_at"] is not None) == (job.state in FINAL)
            assert (shown["result"] is not None) == (job.state == S.SUCCEEDED)

    def teardown(self) -> None:
        for job_id, job in self.model.items():
            _, events = self.call("GET", f"/v1/jobs/{job_id}/events")
            moves = [(e["src"], e["dst"]) for e in events if e["dst"] is not None]
            assert moves[0] == (None, S.QUEUED)
            for (_, before), (src, dst) in pairwise(moves):
                assert src == before
                assert dst in MOVES[S(src)]
            assert moves[-1][1] == job.state
            _, points = self.call("GET", f"/v1/jobs/{job_id}/metrics?key=loss")
            assert {point["step"]: point["value"] for point in points} == job.curve
            if job.running:
                answer = self.runner.run(self.world.ask(job_id, job.attempt)).json()
                told = answer["checkpoint"]
                assert (told["step"] if told else None) == max(job.steps, default=None)


def run_machine(database_url: str, folder: Path, *, max_examples: int) -> None:
    """Run it on a migrated database; each example makes jobs of its own there."""
    with asyncio.Runner() as runner:
        opened = open_world(database_url, folder)
        JobMachine.world, JobMachine.runner = runner.run(opened.__aenter__()), runner
        try:
            run_state_machine_as_test(
                JobMachine,
                settings=settings(max_examples=max_examples, stateful_step_count=40, deadline=None),
            )
        finally:
            runner.run(opened.__aexit__(None, None, None))
