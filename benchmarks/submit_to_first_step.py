"""From `submit` to the first step of training, by part, beside the same TorchTrainer started by hand.

Both run in turns on the Ray cluster of one embedded service. The service's first step counts when a
client can see it, so half a reporting interval on average is part of its time. Ratio: service / by hand.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Times, median_ratio
from scripts.demo_service import DemoError, Service, running
from service.client import Client
from service.contracts.jobs import FINAL, JobState, JobView

ROOT = Path(__file__).resolve().parent.parent
TILES = ROOT / "examples" / "photos" / "train.tar"
POLL_S = 0.1
LIMIT_S = 300.0
# A name and the log line of the job that says that this part is over.
LOGGED = {"trainer start": "ranks on", "model": "training from step"}
START = "process start and data scan"
SERVICE_PARTS = ("submit", "launch", START, *LOGGED, "first step")
HAND_PARTS = (START, "trainer start", "model", "first step")
SPEC: dict[str, Any] = {
    "kind": "tokenizer",
    "name": "bench-first-step",
    "data": {"uri": str(TILES)},
    "model": {"image_size": 64, "width": 16, "vocab_size": 64, "code_dim": 16},
    "training": {"steps": 1, "batch_size": 16, "precision": "fp32", "crop_min": 0.3},
    "resources": {"workers": 1, "cpus_per_worker": min(2, os.cpu_count() or 1)},
}


def by_service(client: Client) -> dict[str, float]:
    """Seconds of each part through the service."""
    started = time.time()
    (job,) = client.submit([SPEC])
    ends = {"submit": time.time()}
    first_step = _first_step(client, job.id)
    job = client.wait(job.id)
    if job.state != JobState.SUCCEEDED:
        raise DemoError(f"the job is {job.state}: {job.reason}")
    ends |= _reached(client, job) | _logged(client, job) | {"first step": first_step}
    return _parts(started, ends, SERVICE_PARTS)


def by_hand(data_dir: Path) -> dict[str, float]:
    """Seconds of each part without the service, on the same cluster."""
    facts = json.loads((data_dir / "processes.json").read_text())["facts"]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CIM_", "RAY_"))},
        "RAY_ADDRESS": f"127.0.0.1:{facts['ray_gcs_port']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(data_dir / "ray_token"),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray looks for 127.0.0.1 at the outer address
    }
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.by_hand", "--spec", json.dumps(SPEC)]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    if done.returncode != 0:
        raise DemoError(f"the trainer started by hand failed:\n{done.stderr[-2000:]}")
    return _parts(started, json.loads(done.stdout.splitlines()[-1]), HAND_PARTS)


def measure(client: Client, data_dir: Path, *, rounds: int) -> tuple[list[dict[str, float]], ...]:
    """Both in turns: parts of each round, service first."""
    service: list[dict[str, float]] = []
    hand: list[dict[str, float]] = []
    for _ in range(rounds):
        service.append(by_service(client))
        hand.append(by_hand(data_dir))
    return service, hand


def _first_step(client: Client, job_id: str) -> float:
    """When a client sees the first step, seconds since the epoch."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        job = client.job(job_id)
        if job.progress.step >= 1:
            return time.time()
        if job.state in FINAL:
            raise DemoError(f"the job is {job.state}: {job.reason}")
        time.sleep(POLL_S)
    raise DemoError(f"no step within {LIMIT_S:g} s; the job is {job.state}: {job.reason}")


def _reached(client: Client, job: JobView) -> dict[str, float]:
    """When the job was launched, and when its worker first spoke, which is after the data scan."""
    reached = {event.dst: event.at.timestamp() for event in client.events(job.id)}
    return {"launch": reached[JobState.LAUNCHING], START: reached[JobState.RUNNING]}


def _logged(client: Client, job: JobView) -> dict[str, float]:
    lines = list(client.logs(job.id))
    found = {}
    for part, words in LOGGED.items():
        at = next((line.at for line in lines if words in line.message), None)
        if at is None:
            raise DemoError(f"no line of the job's log holds {words!r}: the parts cannot be told apart")
        found[part] = at.timestamp()
    return found


def _parts(started: float, ends: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Durations from the times at which the parts ended, and their sum as `total`."""
    durations, before = {}, started
    for name in names:
        durations[name] = ends[name] - before
        before = ends[name]
    return {**durations, "total": before - started}


def times_of(rounds: list[dict[str, float]]) -> dict[str, Times]:
    """The rounds of each part."""
    return {name: Times(seconds=tuple(one[name] for one in rounds)) for name in rounds[0]}


def show(service: Mapping[str, Times], hand: Mapping[str, Times]) -> Table:
    """Both as a table: seconds, median (fastest to slowest)."""
    table = Table(title="s from submit to first step: median (fastest to slowest)", title_justify="left")
    table.add_column("part")
    table.add_column("service", justify="right")
    table.add_column("by hand", justify="right")
    for name in [*SERVICE_PARTS, "total"]:
        table.add_row(name, _cell(service.get(name)), _cell(hand.get(name)))
    table.add_row("ratio of the totals", f"{median_ratio(service['total'], hand['total']):.2f}", "1")
    return table


def _cell(times: Times | None) -> str:
    return "" if times is None else f"{times.median:.2f} ({times.low:.2f}-{times.high:.2f})"


def run(*, rounds: int) -> tuple[dict[str, Times], dict[str, Times]]:
    """Start a service on an empty folder, measure, end it."""
    with tempfile.TemporaryDirectory(prefix="cim-bench-") as folder:
        data_dir = Path(folder) / "data"
        with running(data_dir, environ=os.environ) as service:
            return _measured(service, data_dir, rounds=rounds)


def _measured(service: Service, data_dir: Path, *, rounds: int) -> tuple[dict[str, Times], dict[str, Times]]:
    with Client(service.api) as client:
        through, hand = measure(client, data_dir, rounds=rounds)
    return times_of(through), times_of(hand)


def main() -> int:
    """Measure and print; status 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    try:
        service, hand = run(rounds=given.rounds)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    if given.json:
        found: dict[str, Any] = {
            "service": {name: times.as_json() for name, times in service.items()},
            "by hand": {name: times.as_json() for name, times in hand.items()},
            "ratio of the totals": median_ratio(service["total"], hand["total"]),
        }
        print(json.dumps(found, indent=1))
    else:
        Console(width=120).print(show(service, hand))
    return 0


if __name__ == "__main__":
    sys.exit(main())
