"""Jobs on the screen until they are final: bars on a terminal, lines anywhere else."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from service.cli.connect import FAILED
from service.cli.render import COLOURS, duration, number, plain, speed, steps
from service.client import Client, UnreachableError
from service.contracts.jobs import FINAL, JobState, JobView

POLL_S = 1.0
QUIET_S = 10.0
OUTAGE_S = 300.0
MESSAGE_CHARS = 60


class Display(Protocol):
    """Shows jobs as they come along."""

    def __enter__(self) -> Self:
        """Start to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what was shown last on the screen."""
        ...

    def show(self, job: JobView) -> None:
        """The job as it is now."""
        ...

    def note(self, message: str) -> None:
        """Something that concerns no single job."""
        ...


class Bars:
    """One progress bar a job."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("[{task.fields[colour]}]{task.fields[state]:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[details]}", markup=False, style="dim"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, job: JobView) -> None:
        """Move the job's bar."""
        fields: dict[str, Any] = {
            "state": str(job.state),
            "colour": COLOURS[job.state],
            "steps": steps(job),
            "details": details(job),
        }
        if job.id not in self._tasks:
            self._tasks[job.id] = self._progress.add_task(job.name, total=None, **fields)
        task = self._tasks[job.id]
        total = job.progress.total_steps or (1 if job.state in FINAL else None)
        done = total if job.state == JobState.SUCCEEDED else job.progress.step
        self._progress.update(task, completed=done, total=total, **fields)

    def note(self, message: str) -> None:
        """A line above the bars."""
        self._progress.console.print(message, markup=False)


class Lines:
    """A line for each change of state, and for progress at most every ten seconds."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._said: dict[str, tuple[float, JobState, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left open."""

    def show(self, job: JobView) -> None:
        """Print a line if there is something new to say."""
        text = "  ".join(part for part in (job.name, str(job.state), steps(job), details(job)) if part)
        said_at, said_state, said_text = self._said.get(job.id, (0.0, None, ""))
        quiet = self._clock() - said_at < QUIET_S or text == said_text
        if job.state == said_state and quiet:
            return
        self._said[job.id] = (self._clock(), job.state, text)
        self.note(text)

    def note(self, message: str) -> None:
        """A line."""
        self._console.print(message, markup=False, soft_wrap=True)


def details(job: JobView) -> str:
    """Speed, time left, loss and phase of a running job; why any other is where it is."""
    if job.state != JobState.RUNNING:
        return "" if job.state == JobState.SUCCEEDED else _short(job.reason)
    eta = job.progress.eta_s
    parts = [speed(job), f"{duration(eta)} left" if eta is not None else "", _loss(job), job.progress.message]
    return "  ".join(_short(part) for part in parts if part)


def watch(
    client: Client,
    ids: Sequence[str],
    *,
    display: Display,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[JobView]:
    """The jobs, in the order of `ids`, once all are final.

    Raises:
        UnreachableError: The service did not answer for five minutes.
    """
    latest = {ref: client.job(ref) for ref in ids}
    last_answer, notice = clock(), ""
    with display:
        while True:
            for job in latest.values():
                display.show(job)
            standing = next((job.notice for job in latest.values() if job.notice), "")
            if standing and not notice:
                display.note(standing)
            notice = standing
            open_jobs = [ref for ref, job in latest.items() if job.state not in FINAL]
            if not open_jobs:
                return list(latest.values())
            sleep(POLL_S)
            try:
                latest |= {ref: client.job(latest[ref].id) for ref in open_jobs}
                last_answer = clock()
            except UnreachableError as error:
                silent_s = clock() - last_answer
                if silent_s > OUTAGE_S:
                    raise
                display.note(f"{error.problem.title} for {duration(silent_s)}, trying again: {error}")
                sleep(POLL_S)


def display_for(console: Console) -> Display:
    """Bars where they can move, lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)


def status_of(jobs: Sequence[JobView]) -> int:
    """Exit status: 0 if every job succeeded."""
    return 0 if all(job.state == JobState.SUCCEEDED for job in jobs) else FAILED


def _loss(job: JobView) -> str:
    names = sorted(job.metrics, key=lambda key: (key != "loss", key))
    key = next((name for name in names if "loss" in name), None)
    return "" if key is None else f"{key} {number(job.metrics[key])}"


def _short(text: str) -> str:
    text = " ".join(plain(text).split())
    return text if len(text) <= MESSAGE_CHARS else f"{text[: MESSAGE_CHARS - 1]}…"
