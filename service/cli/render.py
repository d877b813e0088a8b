"""What the commands print for people. Texts of jobs are shown as they are, never as markup."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from service.contracts.jobs import (
    AttemptView,
    EventView,
    FileEntry,
    JobState,
    JobView,
    LogLine,
    MetricPoint,
)
from service.contracts.recipes import RecipeSummary

COLOURS: Mapping[JobState, str] = {
    JobState.QUEUED: "yellow",
    JobState.LAUNCHING: "cyan",
    JobState.RUNNING: "bold cyan",
    JobState.STOPPING: "magenta",
    JobState.PAUSED: "magenta",
    JobState.RETRYING: "yellow",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "dim",
}
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
MAX_ROWS = 30
MAX_METRICS = 12


def jobs_table(jobs: Sequence[JobView], *, now: datetime) -> RenderableType:
    """One row a job."""
    if not jobs:
        return Text("no jobs")
    table = _table("ID", "NAME", "KIND", "STATE", "PROGRESS", "AGE", "REASON")
    for job in jobs:
        row = (
            job.id,
            job.name,
            job.kind,
            state(job.state),
            steps(job),
            ago(job.created_at, now),
            plain(job.reason),
        )
        table.add_row(*(_cell(item) for item in row))
    return table


def recipe_lines(recipe: RecipeSummary) -> str:
    """Name and facts of a recipe, and below them what it is."""
    epochs = "" if recipe.epochs is None else f"{recipe.epochs:g} epochs"
    facts = (recipe.method, recipe.enhancer, recipe.objective, epochs)
    return f"{recipe.name:<24}{', '.join(fact for fact in facts if fact)}\n    {plain(recipe.description)}"


def job_panel(job: JobView, *, now: datetime) -> RenderableType:
    """All about one job that fits on a screen."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(job, now):
        facts.add_row(name, _cell(value))
    parts: list[RenderableType] = [facts]
    if job.attempts:
        parts += [Rule("attempts", style="dim", align="left"), _attempts(job.attempts)]
    if job.metrics:
        parts += [Rule("latest metrics", style="dim", align="left"), _latest(job.metrics)]
    return Panel(Group(*parts), title=Text(f"{job.name}  {job.id}"), title_align="left")


def _facts(job: JobView, now: datetime) -> list[tuple[str, str | Text]]:
    failure = f" ({job.failure_kind})" if job.failure_kind else ""
    wanted = f", {job.desired} wanted" if job.desired != "run" else ""
    facts: list[tuple[str, str | Text]] = [
        ("state", state(job.state).append(f"{failure}{wanted}", style="default")),
        ("reason", plain(job.reason)),
        ("kind", f"{job.kind}, priority {job.priority}"),
        ("labels", ", ".join(f"{key}={value}" for key, value in job.labels.items())),
        ("created", f"{local(job.created_at)} ({ago(job.created_at, now)} ago)"),
        ("progress", _progress(job)),
        ("MLflow", job.mlflow_url or job.mlflow_run_id or ""),
    ]
    if job.started_at:
        end = job.finished_at or now
        facts.insert(
            5, ("ran", f"{duration((end - job.started_at).total_seconds())} from {local(job.started_at)}")
        )
    if job.state == JobState.SUCCEEDED:
        facts.append(("files", f"cim artifacts {job.id}; cim download {job.id}"))
    return [(name, value) for name, value in facts if value]


def _progress(job: JobView) -> str:
    parts = [steps(job), speed(job), plain(job.progress.message)]
    if job.progress.eta_s is not None and job.state == JobState.RUNNING:
        parts.insert(2, f"{duration(job.progress.eta_s)} left")
    return ", ".join(part for part in parts if part)


def _attempts(attempts: Sequence[AttemptView]) -> RenderableType:
    table = _table("N", "STARTED", "LASTED", "OUTCOME", "FROM STEP", "MESSAGE")
    for one in attempts:
        lasted = duration((one.ended_at - one.started_at).total_seconds()) if one.ended_at else ""
        outcome = f"{one.outcome or ''} {one.failure_kind or ''}".strip()
        resumed = "" if one.resumed_from_step is None else str(one.resumed_from_step)
        row = (str(one.number), local(one.started_at), lasted, outcome, resumed, plain(one.message or ""))
        table.add_row(*(_cell(item) for item in row))
    return table


def _latest(metrics: Mapping[str, float]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for key, value in sorted(metrics.items())[:MAX_METRICS]:
        table.add_row(Text(key, style="dim"), number(value))
    if len(metrics) > MAX_METRICS:
        table.add_row(Text(f"and {len(metrics) - MAX_METRICS} more: see cim metrics", style="dim"))
    return table


def metrics_table(points: Sequence[MetricPoint]) -> RenderableType:
    """A line and a small curve for each metric."""
    if not points:
        return Text("no metrics yet")
    curves: dict[str, list[MetricPoint]] = {}
    for point in sorted(points, key=lambda point: point.step):
        curves.setdefault(point.key, []).append(point)
    table = _table("METRIC", "POINTS", "STEP", "LATEST", "MIN", "MAX", "CURVE")
    for key, curve in sorted(curves.items()):
        values = [point.value for point in curve]
        low, high = number(min(values)), number(max(values))
        last = curve[-1]
        table.add_row(key, str(len(curve)), str(last.step), number(last.value), low, high, sparkline(values))
    return table


def curve_table(points: Sequence[MetricPoint]) -> RenderableType:
    """The values of one metric, thinned evenly to a screen; the first and the last are kept."""
    table = _table("STEP", "VALUE")
    ordered = sorted(points, key=lambda point: point.step)
    for index in _thinned(len(ordered), MAX_ROWS):
        table.add_row(str(ordered[index].step), number(ordered[index].value))
    return table


def sparkline(values: Sequence[float], *, width: int = SPARK_WIDTH) -> str:
    """A curve in block characters, the lowest value lowest; longer ones are averaged in bins."""
    num_bins = min(width, len(values))
    edges = [round(i * len(values) / num_bins) for i in range(num_bins + 1)] if num_bins else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, spread = min(means), max(means) - min(means)
    if spread == 0:
        return BARS[0] * len(means)
    return "".join(BARS[round((mean - low) / spread * (len(BARS) - 1))] for mean in means)


def files_table(files: Sequence[FileEntry]) -> RenderableType:
    """One row a file."""
    if not files:
        return Text("no files yet")
    table = _table("PATH", "SIZE", "SHA-256")
    for entry in sorted(files, key=lambda entry: entry.path):
        table.add_row(Text(plain(entry.path), overflow="fold"), size(entry.size), entry.sha256[:12])
    return table


def event_line(event: EventView) -> str:
    """One event on one line."""
    move = f"{event.src or 'new'} -> {event.dst}" if event.dst else ""
    return "  ".join(part for part in (local(event.at), event.actor, move, plain(event.message)) if part)


def log_line(line: LogLine) -> str:
    """One log line; its own line breaks stay."""
    return f"{local(line.at)} {line.attempt}/{line.source} {line.level}: {plain(line.message)}"


def as_yaml(value: Mapping[str, Any]) -> str:
    """YAML in the order of the keys as they come."""
    return str(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True))


def state(value: JobState) -> Text:
    """A state in its colour."""
    return Text(str(value), style=COLOURS[value])


def steps(job: JobView) -> str:
    """`120/500 (24%)`, or what is known of it."""
    step, total = job.progress.step, job.progress.total_steps
    if total:
        return f"{step}/{total} ({step * 100 // total}%)"
    return f"step {step}" if step else ""


def speed(job: JobView) -> str:
    """Images a second of a running job."""
    rate = job.progress.images_per_s
    return f"{number(rate)} images/s" if rate and job.state == JobState.RUNNING else ""


def number(value: float) -> str:
    """Four digits are enough to watch a curve."""
    return f"{value:.4g}"


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a whole number in front."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """`0:05`, `12:34`, `3:25:00`, `2 d 3:25:00`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def ago(then: datetime, now: datetime) -> str:
    """How long ago, in one unit."""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def local(moment: datetime) -> str:
    """Date and time where the user is."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def utc_now() -> datetime:
    """This moment."""
    return datetime.now(UTC)


def plain(text: str) -> str:
    """Without characters that would steer the terminal; line breaks and tabs stay."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def _cell(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(value)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("ID", "STATE", "AGE", "CURVE"))
    return table


def _thinned(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
