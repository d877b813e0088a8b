"""`make demo`: the whole path on a small scale, from photo tiles to an encoder that plain timm loads.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts import demo_data
from scripts.demo_service import DemoError, Service, running
from service.cli.watch import display_for, watch
from service.client import ApiError, Client
from service.contracts.jobs import FINAL, JobState, JobView

DATA_DIR = Path(".cim-demo")
FAILED, USAGE, INTERRUPTED = 1, 2, 130
LAST_POINTS = 5  # of a curve that are averaged: one batch says little


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo."""
    console = Console(highlight=False)
    data = _parser().parse_args(arguments).data
    started = time.monotonic()
    try:
        specs, notes = demo_data.load(data, num_cpus=os.cpu_count() or 1)
    except DemoError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return USAGE
    try:
        run(specs, notes, console=console)
    except KeyboardInterrupt:
        console.print("interrupted; the service and everything it started has ended")
        return INTERRUPTED
    except (DemoError, ApiError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return FAILED
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. The service has ended.")
    return 0


def run(specs: list[demo_data.Spec], notes: Sequence[str], *, console: Console) -> None:
    """Start the service, run the jobs, show what came out, end the service.

    Raises:
        DemoError: The service or a job failed.
    """
    data_dir = DATA_DIR.absolute()
    console.print(f"Starting the service (API, Ray, MLflow) on {data_dir} ...", soft_wrap=True)
    with running(data_dir, environ=os.environ) as service, Client(service.api) as client:
        console.print(f"While it runs: API docs {service.api}/docs, MLflow {service.mlflow}", soft_wrap=True)
        for note in notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        cancel_leftovers(client, console=console)
        submitted = client.submit(specs)
        jobs = watch(client, [job.id for job in submitted], display=display_for(console))
        _check(jobs, service)
        tokenizer, pretrain, evaluate = jobs
        console.print(table(client, tokenizer, pretrain, evaluate))
        console.print("A run of minutes shows that every part works, not how good the method is.")
        _print_paths(client, pretrain, data_dir / "results" / pretrain.id, console=console)


def cancel_leftovers(client: Client, *, console: Console) -> None:
    """Jobs of an interrupted demo would go on now, and take the cores from this one."""
    left = [job for job in client.jobs() if job.state not in FINAL]
    for job in left:
        client.cancel(job.id)
    if left:
        console.print(f"note: cancelled {len(left)} unfinished jobs of an interrupted demo")


def table(client: Client, tokenizer: JobView, pretrain: JobView, evaluate: JobView) -> Table:
    """What the three jobs measured, each beside its yardstick."""
    codes = tokenizer.resolved["model"]["vocab_size"]
    used = round(tokenizer.metrics["val_codes_used"] * codes)
    accuracy = recent(client, pretrain, "mim_accuracy")
    val = Path(evaluate.spec["data"]["val"]).name
    shown = Table(title="What came out", title_justify="left")
    for column in ("", "CIM", "beside it"):
        shown.add_column(column)
    shown.add_row(
        f"k-NN top-1 on the bundled labelled tiles ({val})",
        f"{evaluate.metrics['knn_top1']:.1%}",
        f"{evaluate.metrics['knn_top1_random']:.1%} random encoder",
    )
    shown.add_row(
        "generator, masked tokens right", f"{accuracy:.1%}", f"{1 / codes:.1%} chance (1 of {codes})"
    )
    shown.add_row("tokenizer, PSNR on held-out pictures", f"{tokenizer.metrics['val_psnr']:.1f} dB", "")
    shown.add_row("tokenizer, codes in use there", f"{used} of {codes}", "")
    return shown


def recent(client: Client, job: JobView, key: str) -> float:
    """The mean of the last points of a curve.

    Raises:
        DemoError: The job has no such curve.
    """
    points = client.metrics(job.id, key=key)[-LAST_POINTS:]
    if not points:
        raise DemoError(f"{job.name} has no metric {key}")
    return sum(point.value for point in points) / len(points)


def _check(jobs: Sequence[JobView], service: Service) -> None:
    bad = [f"{job.name} {job.state}: {job.reason}" for job in jobs if job.state != JobState.SUCCEEDED]
    if bad:
        raise DemoError("\n".join([*bad, f"The service's log: {service.log}"]))


def _print_paths(client: Client, pretrain: JobView, folder: Path, *, console: Console) -> None:
    """Fetch encoder and last picture, and say where they are."""
    samples = [entry.path for entry in client.artifacts(pretrain.id) if entry.path.startswith("samples/")]
    last = max(samples, key=lambda path: int(path.rpartition("-")[2].partition(".")[0]))
    client.download(pretrain.id, "encoder", folder)
    client.download(pretrain.id, last, folder)
    encoder = folder / "encoder"
    console.print(f"\nEncoder  {encoder}", soft_wrap=True)
    console.print(f"Picture  {folder / last}", soft_wrap=True)
    console.print("\nLoad it anywhere timm is installed:", soft_wrap=True)
    console.print(
        f'  timm.create_model("local-dir:{encoder}", pretrained=True)', markup=False, soft_wrap=True
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description="The whole path on a small scale.")
    parser.add_argument("--data", type=Path, help="folder or tar of your own pictures; make demo DATA=PATH")
    return parser


if __name__ == "__main__":
    sys.exit(main())
