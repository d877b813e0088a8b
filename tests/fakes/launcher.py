"""A cluster in memory. It passes the same contract tests as Ray (`tests/fakes/launcher_contract.py`)."""

from collections import Counter
from collections.abc import Callable

from service.dispatch.launcher import LauncherUnavailableError, Submission
from service.domain.decide import ClusterJob, ClusterState
from service.domain.queueing import Needs


class CrashError(BaseException):
    """The dispatcher is killed; like a real kill, no `except Exception` sees it."""


class FakeLauncher:
    """Runs nothing: a submission keeps running until a test says otherwise, or it is stopped.

    Two programs end by themselves, as in the contract tests: `-c pass` and `-c raise SystemExit(3)`.
    """

    def __init__(self, *, cpus: float = 8.0, gpus: float = 0.0) -> None:
        self.jobs: dict[str, ClusterJob] = {}
        self.logs: dict[str, list[str]] = {}
        self.submissions: dict[str, Submission] = {}
        self.calls: Counter[str] = Counter()
        self.num_started = Counter[str]()
        self.total = Needs(cpus=cpus, gpus=gpus)
        self.away = False
        self.lose_next_reply = False
        self.on_call: Callable[[str, str], None] = lambda moment, name: None  # ("before" | "after", call)

    async def submit(self, submission: Submission) -> None:
        self._begin("submit")
        if submission.id not in self.jobs:
            self.submissions[submission.id] = submission
            self.num_started[submission.id] += 1
            self.jobs[submission.id], self.logs[submission.id] = _run(submission)
        self.on_call("after", "submit")
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise LauncherUnavailableError("the reply was lost")

    async def status(self, submission_id: str) -> ClusterJob | None:
        self._begin("status")
        return self.jobs.get(submission_id)

    async def stop(self, submission_id: str) -> None:
        self._begin("stop")
        job = self.jobs.get(submission_id)
        if job is not None and not job.state.ended:
            self.jobs[submission_id] = ClusterJob(state=ClusterState.STOPPED, exit_code=-15)
        self.on_call("after", "stop")

    async def log_tail(self, submission_id: str, *, max_lines: int) -> list[str]:
        self._begin("log_tail")
        return self.logs.get(submission_id, [])[-max_lines:]

    async def capacity(self) -> Needs:
        self._begin("capacity")
        return self.total

    def end(self, submission_id: str, state: ClusterState, *, exit_code: int = 1, log: str = "") -> None:
        """Let a driver end by itself."""
        self.jobs[submission_id] = ClusterJob(state=state, exit_code=exit_code)
        self.logs[submission_id] = log.splitlines()

    def forget_everything(self) -> None:
        """Restart the head: nothing outlives the cluster."""
        self.jobs.clear()
        self.logs.clear()

    def _begin(self, call: str) -> None:
        self.calls[call] += 1
        self.on_call("before", call)
        if self.away:
            raise LauncherUnavailableError("Ray at http://fake cannot be asked: refused")


def _run(submission: Submission) -> tuple[ClusterJob, list[str]]:
    match list(submission.command)[-1]:
        case "pass":
            return ClusterJob(state=ClusterState.SUCCEEDED, exit_code=0), []
        case "raise SystemExit(3)":
            return ClusterJob(state=ClusterState.FAILED, exit_code=3), []
        case code if code.startswith("print"):
            printed = code.removeprefix("print(").removesuffix(")").strip("'")
            return ClusterJob(state=ClusterState.SUCCEEDED, exit_code=0), [printed]
        case code if "environ" in code:
            return ClusterJob(state=ClusterState.SUCCEEDED, exit_code=0), list(submission.env.values())
        case _:
            return ClusterJob(state=ClusterState.RUNNING), []
