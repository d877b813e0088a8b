"""A tracker in memory. It passes the same contract tests as MLflow (`tests/fakes/tracker_contract.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from service.dispatch.tracker import (
    MAX_BATCH,
    NewRun,
    Outcome,
    Picture,
    Point,
    TrackerRefusedError,
    TrackerUnavailableError,
)


@dataclass
class FakeRun:
    """One run as a person would see it."""

    new: NewRun
    params: dict[str, str] = field(default_factory=dict)
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    pictures: dict[tuple[str, int], bytes] = field(default_factory=dict)
    outcome: Outcome | None = None
    description: str = ""

    @property
    def closed(self) -> bool:
        """Whether it has an outcome."""
        return self.outcome is not None


class FakeTracker:
    """Remembers everything; `away` makes it fail, `deleted` runs are refused."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.deleted: set[str] = set()
        self.away = False
        self.batches: list[int] = []
        self.lose_next_reply = False

    async def check(self) -> None:
        self._check()

    async def ensure_run(self, run: NewRun) -> str:
        self._check()
        run_id = f"run-{run.job_id}"
        known = self.runs.setdefault(run_id, FakeRun(run, description=run.description))
        known.outcome, known.params = None, {**run.params, **known.params}
        self._reply()
        return run_id

    async def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        run = self._run(run_id)
        assert len(points) <= MAX_BATCH
        self.batches.append(len(points))
        for point in points:
            run.points.setdefault((point.key, point.step), point.value)
        self._reply()

    async def log_picture(self, run_id: str, picture: Picture) -> None:
        self._run(run_id).pictures.setdefault((picture.series, picture.step), picture.png)
        self._reply()

    async def close(self, run_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        run = self._run(run_id)
        run.outcome, run.description = outcome, description
        self._reply()

    async def abandon(self, job_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        self._check()
        for run_id, run in self.runs.items():
            if run.new.job_id == job_id and run_id not in self.deleted and not run.closed:
                run.outcome, run.description = outcome, description
        self._reply()

    async def keep_only(self, run_id: str, *, job_id: str) -> None:
        self._check()
        others = {other for other, run in self.runs.items() if run.new.job_id == job_id} - {run_id}
        self.deleted |= others
        self._reply()

    def _run(self, run_id: str) -> FakeRun:
        self._check()
        if run_id in self.deleted or run_id not in self.runs:
            raise TrackerRefusedError(f"no run {run_id}")
        return self.runs[run_id]

    def _check(self) -> None:
        if self.away:
            raise TrackerUnavailableError("the tracker does not answer")

    def _reply(self) -> None:
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise TrackerUnavailableError("the reply was lost")
