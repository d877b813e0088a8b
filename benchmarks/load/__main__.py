"""Load on the control plane: PostgreSQL, api and dispatcher as processes of their own, all on this machine.

Submissions come at a steady rate and are timed from the moment at which they were due. The baseline is a bare
FastAPI with one INSERT a request, on the same server, in turns with the service.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import client, database, dispatching, pages, passes, processes
from benchmarks.load.client import Latencies
from benchmarks.timing import Times
from service.contracts.jobs import JobState
from tests.integration.servers import ray_head

_TURNS = 4
_DAY_S = 86_400
Results = Iterator["Result"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table, in seconds."""

    what: str
    median_s: float
    worst_s: float  # the 99th percentile of submissions, else the slowest round
    aim_s: float | None = None
    baseline_s: float | None = None  # its median


def submits(server: database.Server, folder: Path, given: argparse.Namespace) -> Results:
    """Submissions at a steady rate for a minute, with a dispatcher at work, beside the bare insert."""
    uri = server.database()
    num = round(given.rate * given.seconds / _TURNS)
    with ExitStack() as ends:
        cluster = ends.enter_context(processes.cluster(folder))
        api = ends.enter_context(processes.api(uri, folder, cluster=cluster))
        bare = ends.enter_context(processes.bare(uri, folder))
        ends.enter_context(processes.dispatcher(uri, folder, cluster=cluster))
        ours: list[Latencies] = []
        theirs: list[Latencies] = []
        for turn in range(_TURNS):
            bodies = [{**database.SPEC, "name": f"turn-{turn}-{number}"} for number in range(num)]
            theirs.append(asyncio.run(client.post_steadily(f"{bare}/things", bodies, rate=given.rate)))
            ours.append(asyncio.run(client.post_steadily(f"{api.url}/v1/jobs", bodies, rate=given.rate)))
    yield _of(f"submit, {given.rate:g} a second", ours, theirs, aim_s=0.1)
    yield _of(f"the baseline's insert, {given.rate:g} a second", theirs, theirs)


def _of(what: str, ours: list[Latencies], theirs: list[Latencies], aim_s: float | None = None) -> Result:
    mine, other = sum(ours[1:], ours[0]), sum(theirs[1:], theirs[0])
    if mine.num_failed:
        raise RuntimeError(f"{what}: {mine.num_failed} requests were not answered as expected")
    return Result(
        what=what, median_s=mine.at(0.5), worst_s=mine.at(0.99), aim_s=aim_s, baseline_s=other.at(0.5)
    )


def lists(server: database.Server, folder: Path, given: argparse.Namespace) -> Results:
    """Pages over all jobs."""
    uri = server.database()
    database.fill(uri, JobState.SUCCEEDED, given.finished, ago_s=2 * given.queued)
    database.fill(uri, JobState.QUEUED, given.queued)
    with processes.api(uri, folder) as api, processes.bare(uri, folder) as bare:
        found = pages.measure(api.url, bare)
        baseline = found[pages.BASELINE]
        for name, times in found.items():
            yield _result(f"page: {name}", times, aim_s=0.05, baseline=baseline)
        yield _result("show: the beginning of an id", pages.measure_lookup(api.url), aim_s=0.05)


def live(server: database.Server, folder: Path, given: argparse.Namespace) -> Results:
    """A pass over waiting jobs and over running ones, with finished ones beside them."""
    for state in (JobState.QUEUED, JobState.RUNNING):
        uri = server.database()
        database.fill(uri, JobState.SUCCEEDED, given.live, ago_s=_DAY_S)
        database.fill(uri, state, given.live)
        read = passes.measure_read(uri)
        first, others = passes.measure_pass(uri, folder)
        what = f"pass over {given.live} {state} jobs"
        yield _result(f"{what}, the first", Times(seconds=(first,)), aim_s=1.0, baseline=read)
        yield _result(what, others, aim_s=1.0, baseline=read)


def dispatch(server: database.Server, folder: Path, given: argparse.Namespace) -> Results:
    """Dispatchers that start again, and that give places away, beside Ray's own job submission."""
    with ray_head(folder) as ray:
        rays = dispatching.of_ray(ray.url, ray.token, rounds=given.rounds)
    for name, times in rays.items():
        yield _result(f"Ray's own job submission, {name}", times)
    for num_jobs in (given.live // 10, given.live):
        uri = server.database()
        database.fill(uri, JobState.QUEUED, num_jobs)
        what = f"a place is free until the next launch, {num_jobs} jobs"
        times = dispatching.handovers(uri, folder, rounds=given.rounds)
        yield _result(what, times, aim_s=1.0, baseline=rays["taken"])
    for name, seconds in dispatching.restart(uri, folder).items():
        yield _result(f"killed until {name}, {given.live} jobs", Times(seconds=(seconds,)), aim_s=10.0)


def _result(what: str, times: Times, *, aim_s: float | None = None, baseline: Times | None = None) -> Result:
    median = None if baseline is None else baseline.median
    return Result(what=what, median_s=times.median, worst_s=times.high, aim_s=aim_s, baseline_s=median)


PARTS: dict[str, Callable[[database.Server, Path, argparse.Namespace], Results]] = {
    "submits": submits,
    "lists": lists,
    "live": live,
    "dispatch": dispatch,
}


def run(given: argparse.Namespace) -> Iterator[Result]:
    """The parts asked for, one after the other."""
    for name in given.part or PARTS:
        with _workplace() as (server, folder):
            for result in PARTS[name](server, folder, given):
                print(f"{result.what}: {1e3 * result.median_s:.1f} ms", file=sys.stderr)
                yield result


@contextmanager
def _workplace() -> Iterator[tuple[database.Server, Path]]:
    with database.server() as server, tempfile.TemporaryDirectory(prefix="cim-load-") as folder:
        yield server, Path(folder)


def show(results: list[Result]) -> Table:
    """Milliseconds."""
    table = Table(title="control plane under load, ms", title_justify="left")
    for name in ("", "median", "worst", "aim", "baseline", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for one in results:
        ratio = "" if one.baseline_s is None else f"{one.median_s / one.baseline_s:.1f}"
        table.add_row(one.what, *map(_ms, (one.median_s, one.worst_s, one.aim_s, one.baseline_s)), ratio)
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--rate", type=float, default=100.0, help="submissions a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of submissions, for each of the two")
    parser.add_argument("--finished", type=int, default=1_000_000, help="finished jobs behind the pages")
    parser.add_argument("--queued", type=int, default=100_000, help="waiting jobs behind the pages")
    parser.add_argument("--live", type=int, default=10_000, help="open jobs of a pass and a restart")
    parser.add_argument("--rounds", type=int, default=20, help="of places given away")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    results = list(run(given))
    found: list[dict[str, Any]] = [asdict(result) for result in results]
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(show(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
