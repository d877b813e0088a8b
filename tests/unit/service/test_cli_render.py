"""What people see."""

from datetime import timedelta
from itertools import pairwise

import pytest
from rich.console import Console, RenderableType

from service.cli import render
from service.contracts.jobs import (
    AttemptView,
    Desired,
    EventView,
    FailureKind,
    FileEntry,
    JobState,
    LogLine,
    MetricPoint,
    Progress,
)
from tests.fakes.scripted import CREATED, JOB_ID, job


def shown(item: RenderableType, *, width: int = 200) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(item)
    return capture.get()


def points(key: str, *values: float) -> list[MetricPoint]:
    return [MetricPoint(step=step, key=key, value=value) for step, value in enumerate(values)]


def test_states__each_has_a_colour() -> None:
    assert set(render.COLOURS) == set(JobState)


def test_jobs__one_row_each() -> None:
    other = job(
        JobState.QUEUED, name="other", id="f" * 16, progress=Progress(), reason="waiting for job street"
    )
    lines = shown(render.jobs_table([job(step=24), other], now=CREATED + timedelta(minutes=5))).splitlines()
    assert lines[1].split() == [
        JOB_ID,
        "street",
        "pretrain",
        "running",
        "24/100",
        "(24%)",
        "5",
        "min",
        "as",
        "told",
    ]
    assert lines[2].split()[:4] == ["f" * 16, "other", "pretrain", "queued"]
    assert "waiting for job street" in lines[2]
    assert shown(render.jobs_table([], now=CREATED)) == "no jobs\n"


def test_jobs__a_narrow_screen_keeps_the_whole_id() -> None:
    narrow = shown(render.jobs_table([job(reason="a long story " * 10)], now=CREATED), width=80)
    assert JOB_ID in narrow
    assert "running" in narrow


def test_panel__tells_all() -> None:
    attempt = AttemptView(
        number=1,
        submission_id="s",
        started_at=CREATED,
        ended_at=CREATED + timedelta(seconds=65),
        outcome="failed",
        failure_kind=FailureKind.INFRASTRUCTURE,
        message="the node [red]went away",
        resumed_from_step=7,
    )
    view = job(
        step=50,
        desired=Desired.CANCEL,
        attempts=[attempt],
        metrics={f"metric{number:02d}": number / 3 for number in range(14)},
        labels={"team": "vision"},
        started_at=CREATED,
        mlflow_url="http://127.0.0.1:5000/#/experiments/1/runs/abc",
        progress=Progress(step=50, total_steps=100, images_per_s=61.234, eta_s=125, message="reading [bold]"),
    )
    text = shown(render.job_panel(view, now=CREATED + timedelta(hours=2)))
    for part in (
        "running, cancel wanted",
        "as told",
        "team=vision",
        "(2 h ago)",
        "2:00:00 from",
        "50/100 (50%), 61.23 images/s, 2:05 left, reading [bold]",
        "http://127.0.0.1:5000/#/experiments/1/runs/abc",
        "failed infrastructure",
        "1:05",
        "the node [red]went away",
        "metric00",
        "and 2 more: see cim metrics",
    ):
        assert part in text
    assert "metric12" not in text
    assert "cim download" not in text


def test_panel__a_success_says_how_to_get_the_files() -> None:
    text = shown(render.job_panel(job(JobState.SUCCEEDED, step=100), now=CREATED))
    assert f"cim download {JOB_ID}" in text


def test_metrics__a_line_and_a_curve_each() -> None:
    lines = shown(render.metrics_table([*points("loss", 4.0, 3.0, 2.5), *points("acc", 0.5)])).splitlines()
    assert lines[1].split() == ["acc", "1", "0", "0.5", "0.5", "0.5", "▁"]
    assert lines[2].split() == ["loss", "3", "2", "2.5", "2.5", "4", "█▃▁"]
    assert shown(render.metrics_table([])) == "no metrics yet\n"


def test_curve__is_thinned_with_both_ends() -> None:
    lines = shown(render.curve_table(points("x", *range(1000)))).splitlines()[1:]
    steps = [int(line.split()[0]) for line in lines]
    assert len(steps) == 30
    assert (steps[0], steps[-1]) == (0, 999)
    gaps = [b - a for a, b in pairwise(steps)]
    assert set(gaps) <= {34, 35}
    assert len(shown(render.curve_table(points("x", 1, 2))).splitlines()) == 3


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        (list(range(8)), "▁▂▃▄▅▆▇█"),
        ([0.0, 7.0, 0.0], "▁█▁"),
        ([-1.0, 1.0], "▁█"),
    ],
)
def test_sparkline__by_hand(values: list[float], line: str) -> None:
    assert render.sparkline(values) == line


def test_sparkline__longer_curves_are_averaged() -> None:
    # Bins of two: means 0.5, 2.5, 4.5, 6.5, which lie at 0, 1/3, 2/3 and 1 of the way.
    assert render.sparkline(list(range(8)), width=4) == "▁▃▆█"
    assert len(render.sparkline([1.0] * 1001)) == render.SPARK_WIDTH


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (4.6, "0:05"), (754, "12:34"), (12300, "3:25:00"), (185100, "2 d 3:25:00"), (-3, "0:00")],
)
def test_duration__is_short(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_size__takes_the_largest_unit(num_bytes: int, text: str) -> None:
    assert render.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (119, "1 min"), (7200, "2 h"), (200000, "2 d"), (-5, "0 s")]
)
def test_ago__in_one_unit(seconds: int, text: str) -> None:
    assert render.ago(CREATED, CREATED + timedelta(seconds=seconds)) == text


def test_steps__what_is_known() -> None:
    assert render.steps(job(step=7)) == "7/100 (7%)"
    assert render.steps(job(progress=Progress(step=7))) == "step 7"
    assert render.steps(job(progress=Progress())) == ""


def test_lines__steer_no_terminal() -> None:
    line = LogLine(at=CREATED, attempt=2, source="rank-0", level="info", message="\x1b[31mred\x07\ttab\nnext")
    assert render.log_line(line).endswith(" 2/rank-0 info: [31mred\ttab\nnext")
    event = EventView(
        id=1, at=CREATED, src=JobState.QUEUED, dst=JobState.LAUNCHING, actor="user", message="go\x1b"
    )
    assert render.event_line(event).endswith("  user  queued -> launching  go")
    first = EventView(id=1, at=CREATED, dst=JobState.QUEUED, actor="user", message="submitted")
    assert "new -> queued" in render.event_line(first)


def test_files__with_their_size() -> None:
    entries = [
        FileEntry(path="b", size=2048, sha256="1" * 64),
        FileEntry(path="a/c", size=1, sha256="2" * 64),
    ]
    lines = shown(render.files_table(entries)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a/c", "1", "B", "2" * 12],
        ["b", "2.0", "KiB", "1" * 12],
    ]
    assert shown(render.files_table([])) == "no files yet\n"
