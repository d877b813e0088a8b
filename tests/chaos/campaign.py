"""`python -m tests.chaos`: a storm of faults over a load of jobs, then the verdict of the checker."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client.errors import ApiError
from tests.chaos.collect import collect
from tests.chaos.faults import CATALOGUE, Fault
from tests.chaos.history import History
from tests.chaos.invariants import Violation, check
from tests.chaos.load import Users, num_open, plan
from tests.chaos.log_rules import num_waiting
from tests.chaos.stack import Stack

REST_S = 600.0  # without one job fewer that is open when the storm is over, or one run fewer in the tracker
GONE_S = 60.0  # for the last processes
_POLL_S = 0.2
_RULE_OF = {"lost": "accepted_jobs_are_not_lost", "doubled": "nothing_is_made_twice"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller asked for."""

    seed: int
    minutes: float
    jobs: int
    faults: Sequence[str]
    calm_s: float = 3.0  # between two faults

    @property
    def storm_s(self) -> float:
        """How long the storm will last: the time that was asked for, or one round of all faults."""
        a_round = sum(CATALOGUE[name]().hold_s * 0.8 + self.calm_s * 0.75 for name in self.faults)
        return max(self.minutes * 60, a_round)


@dataclass(kw_only=True)
class Result:
    """What a campaign says."""

    seed: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    attempts: int = 0
    calls: int = 0
    wishes: dict[str, int] = field(default_factory=dict)  # calls of each verb that were accepted
    waiting_lines: int = 0  # of logs, on the disk of workers after which no other one of the job came
    refused_commits: int = 0  # of workers that were told that they may no longer write
    violations: list[Violation] = field(default_factory=list)

    def number_of(self, what: str) -> int:
        """How many jobs were `lost` or `doubled`."""
        return len({v.subject for v in self.violations if v.rule == _RULE_OF[what]})


def run(options: Options, folder: Path, *, console: Console) -> Result:
    """One campaign in `folder`, which must be empty."""
    result, began = Result(seed=options.seed), time.monotonic()
    stack = Stack(folder=folder, seed=options.seed)
    try:
        with console.status("starting PostgreSQL, S3, MLflow, two apis, two dispatchers, a cluster"):
            stack.start()
        errands = plan(options.seed, jobs=options.jobs, over_s=options.storm_s * 0.9)
        users = Users(stack.client(), stack.journal)
        users.start(errands)
        try:
            injected = storm(stack, options, console=console)
            with console.status("calm: the jobs come to their ends"):
                users.finish(len(errands), within_s=REST_S)
                left = settle(stack, users)
        finally:
            users.close()
        with console.status("reading database, store, API and MLflow"):
            history = collect(stack, left=left)
        summarise(result, history, injected)
    finally:
        stack.close()
    result.seconds = time.monotonic() - began
    return result


def storm(stack: Stack, options: Options, *, console: Console) -> Counter[str]:
    """Fault after fault until the time is over and each had its turn; how often each was injected."""
    random = Random(options.seed)
    done: Counter[str] = Counter()
    began = time.monotonic()
    deadline = began + options.minutes * 60
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("storm", total=options.storm_s)
        while time.monotonic() < deadline or len(done) < len(options.faults):
            for name in random.sample(list(options.faults), len(options.faults)):
                if time.monotonic() >= deadline and name in done:
                    continue
                progress.update(task, description=name)
                if _inject(stack, name, random):
                    done[name] += 1
                else:
                    done[f"{name} (not sprung)"] += 1
                    done[name] += 0
                progress.update(task, description="calm", completed=time.monotonic() - began)
                time.sleep(random.uniform(0.5, 1.0) * options.calm_s)
    return done


def _inject(stack: Stack, name: str, random: Random) -> bool:
    """One fault from its beginning to its end; False where a trap did not spring."""
    fault: Fault = CATALOGUE[name]()
    hold_s = fault.hold_s * random.uniform(0.6, 1.0)
    stack.journal.note("fault", name=name, hold_s=hold_s)
    try:
        fault.inject(stack, random)
        deadline = time.monotonic() + hold_s
        while time.monotonic() < deadline and not fault.over(stack):
            time.sleep(_POLL_S)
        sprung = fault.over(stack)
    finally:
        fault.heal(stack)
        stack.journal.note("healed", name=name)
    return sprung or not name.startswith("step-")


def settle(stack: Stack, users: Users) -> list[str]:
    """Wait for the end of every job, its processes and its run; the processes that are left.

    No job that was left paused comes to an end by itself, so the users take care of these first.
    """
    client = stack.client()

    def jobs() -> int:
        users.wake()
        return num_open(client)

    patiently(jobs, within_s=REST_S, what="jobs that are not final")
    patiently(lambda: len(stack.workers()), within_s=GONE_S, what="workers")
    patiently(lambda: _num_open_runs(stack), within_s=REST_S, what="runs that are not closed")
    return [f"{process.pid}: {' '.join(process.cmdline())}" for process in stack.workers()]


def patiently(left: Callable[[], int], *, within_s: float, what: str) -> None:
    """Until none is left. The time runs anew whenever there are fewer: a busy machine breaks no rule."""
    fewest, deadline = sys.maxsize, time.monotonic() + within_s
    while time.monotonic() < deadline and fewest > 0:
        with suppress(ApiError):
            number = left()
            if number < fewest:
                fewest, deadline = number, time.monotonic() + within_s
        time.sleep(_POLL_S)
    if fewest > 0:
        # What has not come to rest by then is the checker's to judge, with everything else.
        sys.stderr.write(f"for {within_s:g} s no fewer {what} than {fewest}\n")


def _num_open_runs(stack: Stack) -> int:
    with psycopg.connect(stack.postgres.uri) as connection:
        query = "SELECT count(*) FROM jobs WHERE attempt > 0 AND NOT mlflow_closed"
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def summarise(result: Result, history: History, injected: Counter[str]) -> None:
    """Fill in the numbers and the verdict."""
    result.faults = dict(sorted(injected.items()))
    result.states = dict(Counter(job.state for job in history.jobs.values()))
    result.attempts = sum(job.attempt for job in history.jobs.values())
    result.calls = len(history.calls)
    result.wishes = dict(Counter(call.op for call in history.calls if call.of and call.jobs))
    result.waiting_lines = num_waiting(history)
    result.refused_commits = sum(effect.kind == "refused" for effect in history.effects)
    result.violations = check(history)


def show(result: Result, *, console: Console) -> None:
    """The tables."""
    table = Table("fault", "injected", title=f"seed {result.seed}: {result.seconds:.0f} s")
    for name, number in result.faults.items():
        table.add_row(name, str(number))
    console.print(table)
    states = ", ".join(f"{number} {state}" for state, number in sorted(result.states.items()))
    console.print(
        f"faults injected {sum(n for f, n in result.faults.items() if not f.endswith('sprung)'))}, "
        f"jobs {sum(result.states.values())} ({states}), attempts {result.attempts}, "
        f"wishes {result.wishes}, stale workers refused {result.refused_commits}, "
        f"log lines that wait {result.waiting_lines}, "
        f"lost {result.number_of('lost')}, doubled {result.number_of('doubled')}, "
        f"violations {len(result.violations)}"
    )
    for violation in result.violations:
        console.print(f"[red]{violation.rule}[/] {violation.subject}: {violation.detail}")
    if result.violations:
        console.print(f"repeat it with --seed {result.seed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one campaign; 1 where a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="of storm; each fault has its turn anyway"
    )
    parser.add_argument("--jobs", type=int, default=250)
    parser.add_argument(
        "--fault", action="append", choices=sorted(CATALOGUE), help="may be given several times"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--keep", type=Path, help="an empty folder for journals and logs, which stays")
    given = parser.parse_args(arguments)
    console = Console(stderr=given.json)
    console.print(f"seed {given.seed}")
    options = Options(
        seed=given.seed, minutes=given.minutes, jobs=given.jobs, faults=given.fault or list(CATALOGUE)
    )
    folder = given.keep or Path(tempfile.mkdtemp(prefix="cim-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = run(options, folder, console=console)
    show(result, console=console)
    if given.json:
        print(json.dumps(asdict(result)))  # noqa: T201
    if result.violations:
        console.print(f"journals and logs: {folder}")
    elif given.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if result.violations else 0
