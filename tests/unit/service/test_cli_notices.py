"""What keeps everybody waiting is told on standard error, so that standard output stays data."""

import json

from service.contracts.jobs import JobPage, JobState
from tests.fakes.scripted import Server, job, ok
from tests.unit.service.conftest import Run

URL = "http://service:1"
NOTICE = "dispatching has stood still for 43 s: the database does not answer: malformed JSON"


def test_ls__says_it_once_beside_the_jobs(run: Run) -> None:
    pages = [JobPage(jobs=[job()], next_cursor=cursor, notice=NOTICE) for cursor in ("next", None)]
    found = run(Server(*map(ok, pages)), "ls", "--json", "--url", URL)
    assert found.exit_code == 0
    assert len(json.loads(found.stdout)) == 2
    assert " ".join(found.stderr.split()) == NOTICE


def test_ls__says_it_where_there_is_no_job_either(run: Run) -> None:
    found = run(Server(ok(JobPage(jobs=[], notice=NOTICE))), "ls", "--url", URL)
    assert NOTICE in " ".join(found.stderr.split())


def test_ls__has_nothing_to_say_where_dispatching_goes_on(run: Run) -> None:
    assert run(Server(ok(JobPage(jobs=[job()]))), "ls", "--url", URL).stderr == ""


def test_show__says_it_too(run: Run) -> None:
    found = run(Server(ok(job(JobState.QUEUED, notice=NOTICE))), "show", "street", "--json", "--url", URL)
    assert json.loads(found.stdout)["notice"] == NOTICE
    assert " ".join(found.stderr.split()) == NOTICE


def test_watch__says_it_when_it_begins(run: Run) -> None:
    states = [JobState.QUEUED] * 3
    notices = [None, NOTICE, NOTICE]
    answers = [ok(job(state, notice=notice)) for state, notice in zip(states, notices, strict=True)]
    found = run(Server(*answers, ok(job(JobState.SUCCEEDED, step=100))), "watch", "street", "--url", URL)
    assert found.exit_code == 0
    assert " ".join(found.stderr.split()).count(NOTICE) == 1
