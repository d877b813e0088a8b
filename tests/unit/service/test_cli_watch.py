"""Watching jobs: what is said when, and when it ends."""

import io

import httpx
import pytest
from rich.console import Console

from service.cli.watch import Bars, Lines, details, display_for, status_of, watch
from service.client import ApiError, Client, UnreachableError
from service.contracts.jobs import JobState, JobView, Progress
from tests.fakes.scripted import JOB_ID, Clock, Server, job, ok, problem

REFUSED = httpx.ConnectError("no")


def client_of(server: Server, clock: Clock) -> Client:
    return Client(
        "http://service:1",
        backoff=clock.backoff(),
        refused_is_final=True,
        transport=httpx.MockTransport(server),
    )


def watched(server: Server, clock: Clock, *refs: str) -> tuple[list[JobView], list[str]]:
    """The jobs at the end, and the lines printed meanwhile."""
    text = io.StringIO()
    console = Console(file=text, width=300)
    display = Lines(console, clock=lambda: clock.now)
    jobs = watch(client_of(server, clock), refs, display=display, clock=lambda: clock.now, sleep=clock.sleep)
    return jobs, text.getvalue().splitlines()


def test_lines__one_for_each_state() -> None:
    queued = job(JobState.QUEUED, reason="waiting for job tokens", progress=Progress())
    server = Server(
        ok(queued), ok(queued), ok(job(JobState.RUNNING, step=1)), ok(job(JobState.SUCCEEDED, step=100))
    )
    jobs, lines = watched(server, Clock(), "street")
    assert [view.state for view in jobs] == ["succeeded"]
    assert lines == [
        "street  queued  waiting for job tokens",
        "street  running  1/100 (1%)",
        "street  succeeded  100/100 (100%)",
    ]
    assert server.calls == ["GET /v1/jobs/street", *[f"GET /v1/jobs/{JOB_ID}"] * 3]


def test_lines__progress_at_most_every_ten_seconds() -> None:
    running = [ok(job(step=step)) for step in range(25)]  # a look a second
    _, lines = watched(Server(*running, ok(job(JobState.SUCCEEDED, step=100))), Clock(), "street")
    assert [line.split()[2] for line in lines] == ["0/100", "10/100", "20/100", "100/100"]


def test_lines__nothing_new_is_not_said_again() -> None:
    running = [ok(job(step=3))] * 40
    _, lines = watched(Server(*running, ok(job(JobState.CANCELLED, step=3))), Clock(), "street")
    assert [line.split()[1] for line in lines] == ["running", "cancelled"]


def test_watch__several_jobs_until_the_last_and_no_look_at_a_final_one() -> None:
    a, b = (job(id=letter * 16, name=letter) for letter in "ab")
    a_done = a.model_copy(update={"state": JobState.SUCCEEDED})
    b_done = b.model_copy(update={"state": JobState.FAILED, "reason": "out of memory"})
    server = Server(ok(a), ok(b), ok(a_done), ok(b), ok(b), ok(b_done))
    jobs, lines = watched(server, Clock(), "a", "b")
    assert jobs == [a_done, b_done]
    assert server.calls[2:] == [f"GET /v1/jobs/{letter * 16}" for letter in "abbb"]
    assert lines[-1] == "b  failed  0/100 (0%)  out of memory"
    assert status_of(jobs) == 1
    assert status_of([a_done]) == 0
    assert status_of([job(JobState.CANCELLED)]) == 1


def test_watch__lives_through_an_outage() -> None:
    server = Server(ok(job()), *[REFUSED] * 20, ok(job(JobState.SUCCEEDED, step=100)))
    jobs, lines = watched(server, Clock(), "street")
    assert jobs[0].state == "succeeded"
    assert any("trying again" in line for line in lines)


def test_watch__gives_up_after_five_minutes() -> None:
    clock = Clock()
    with pytest.raises(UnreachableError):
        watched(Server(ok(job()), REFUSED), clock, "street")
    assert 300 < clock.now < 305


@pytest.mark.parametrize("answer", [REFUSED, problem(404, "not_found")], ids=["away", "unknown"])
def test_watch__a_first_look_that_fails_is_told_at_once(answer: httpx.Response | Exception) -> None:
    clock = Clock()
    with pytest.raises(ApiError):
        watched(Server(answer), clock, "street")
    assert clock.now == 0


def test_details__of_a_running_job() -> None:
    progress = Progress(step=5, total_steps=100, images_per_s=61.234, eta_s=90, message="step\x1b one\nmore")
    view = job(progress=progress, metrics={"mim_loss": 3.25, "accuracy": 0.5, "respix_loss": 1.0})
    assert details(view) == "61.23 images/s  1:30 left  mim_loss 3.25  step one more"
    assert "loss 0.125" in details(job(metrics={"aux_loss": 1.0, "loss": 0.125}))


def test_details__of_any_other_state_is_the_reason() -> None:
    assert details(job(JobState.RETRYING, reason="the node went away")) == "the node went away"
    assert len(details(job(JobState.FAILED, reason="x" * 500))) == 60
    assert details(job(JobState.SUCCEEDED)) == ""


def test_bars__show_the_latest_of_each_job() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160, color_system=None, legacy_windows=False)
    assert isinstance(display_for(console), Bars)
    assert isinstance(display_for(Console(file=text)), Lines)
    with Bars(console) as bars:
        bars.show(job(JobState.QUEUED, progress=Progress(), reason="[waiting]"))
        bars.show(job(step=40))
        bars.show(job(id="f" * 16, name="other", step=7))
        bars.show(job(JobState.SUCCEEDED, step=100))
        bars.note("a [note]")
    last = text.getvalue()
    assert "a [note]" in last
    street, other = [line for line in last.splitlines() if "100 (" in line][-2:]
    assert "street" in street
    assert "succeeded" in street
    assert "100/100 (100%)" in street
    assert "other" in other
    assert "7/100 (7%)" in other
    assert street.count("━") == 24  # the bar's whole width
    assert other.count("━") == 1  # 1.68 cells: one, and a half one
