"""The commands. Each finds the service, makes one or a few calls, and prints the answer.

Standard output holds the answer alone (JSON with `--json`); everything else goes to standard
error. Exit status: 0 done, 1 failed, 2 wrong usage or a spec that is refused, 130 interrupted.

What draws and what speaks HTTP is imported by the command that needs it: `cim --help` is quick.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service.cli import database, specs
from service.cli.connect import (
    INTERRUPTED,
    USAGE,
    Commands,
    connect,
    err,
    naming,
    out,
    print_json,
    print_json_line,
    say,
)
from service.cli.garbage import garbage

if TYPE_CHECKING:
    from pydantic import BaseModel

    from service.client import Client
    from service.contracts.jobs import JobView

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-train visual encoders on your own images. Jobs are named by id, by a unique prefix "
    "of it, or by name (the latest of that name).",
)

app.add_typer(database.app, name="db")

DATA_DIR = Path(".cim")
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id, unique prefix of it, or name.")]
SpecFile = Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - reads standard input.")]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="[NAME:]a.b=VALUE", help="Change a key in every spec, or in NAME's."),
]
Url = Annotated[str | None, typer.Option("--url", envvar="CIM_URL", help="Address of the service.")]
DataDir = Annotated[
    Path,
    typer.Option("--data-dir", envvar="CIM_DATA_DIR", help="Folder of a service on this machine."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is final.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"cim-service {version('cim-service')}", markup=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end."),
    ] = False,
) -> None:
    """What stands before a command."""
    del version


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    ctx: typer.Context,
    port: Annotated[
        int | None, typer.Option(help="Of the API; 0: any free one.", show_default="8000")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="Of the MLflow UI; 0: any free one.", show_default="5000")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Run the whole service on this machine until Ctrl-C; it needs nothing else."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("ray") is None:
        say("this installation holds the client alone; install cim-service[all] to run the service")
        raise typer.Exit(USAGE)
    command = [sys.executable, "-m", "service", "up", "--data-dir", str(data_dir)]
    # A port that is not given may be that of a killed run, which the service knows.
    command += [] if port is None else ["--port", str(port)]
    command += [] if mlflow_port is None else ["--mlflow-port", str(mlflow_port)]
    command += ["--json"] if as_json else []
    os.execv(sys.executable, [*command, *ctx.args])  # noqa: S606  the service takes this process's place


@app.command()
def submit(
    file: SpecFile,
    sets: Sets = [],  # noqa: B006  typer copies it
    watching: Annotated[bool, typer.Option("--watch", help="Show progress until all are final.")] = False,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Queue every spec of a file, all or none."""
    found = specs.load(file, sets=sets)
    with connect(url, data_dir) as client:
        with naming(found):
            jobs = client.submit(found)
        if watching:
            _watch(client, [job.id for job in jobs], as_json=as_json)
        elif as_json:
            print_json(_dump(jobs))
        else:
            for job in jobs:
                out.print(f"{job.id}  {job.name}  {job.state}", markup=False)


@app.command()
def validate(
    file: SpecFile,
    sets: Sets = [],  # noqa: B006
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Check a file and show its specs with every default; nothing is queued."""
    from service.cli import estimates

    found = specs.load(file, sets=sets)
    with connect(url, data_dir) as client, naming(found):
        validation = client.validate(found)
    for warning in validation.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(validation.model_dump(mode="json"))
    else:
        out.print(estimates.validation_text(validation), markup=False, soft_wrap=True, end="")


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Print this one, comments and all.")] = "",
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """List the recipes that specs can build on (recipe: NAME), or print one."""
    from service.cli import render

    with connect(url, data_dir) as client:
        found = client.recipe(name) if name else client.recipes()
    if as_json:
        print_json(_dump(found) if isinstance(found, list) else found.model_dump(mode="json"))
    elif isinstance(found, list):
        for one in found:
            out.print(render.recipe_lines(one), markup=False, soft_wrap=True)
    else:
        out.print(found.text, markup=False, soft_wrap=True, end="")


@app.command()
def ls(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind.")] = None,
    label: Annotated[str | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from service.cli import render

    jobs: list[JobView] = []
    with connect(url, data_dir) as client:
        for page in client.pages(page_size=min(limit, 100), state=state, kind=kind, label=label):
            if page.notice and not jobs:
                say(page.notice)
            jobs += page.jobs[: limit - len(jobs)]
            if len(jobs) == limit:
                break
    if as_json:
        print_json(_dump(jobs))
    else:
        out.print(render.jobs_table(jobs, now=render.utc_now()))


@app.command()
def show(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """Show all about one job."""
    from service.cli import render

    with connect(url, data_dir) as client:
        view = client.job(job)
    if view.notice:
        say(view.notice)
    if as_json:
        print_json(view.model_dump(mode="json"))
    else:
        out.print(render.job_panel(view, now=render.utc_now()))


@app.command("watch")
def watch_jobs(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids, prefixes or names.")],
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Show progress until the jobs are final; Ctrl-C leaves them running."""
    with connect(url, data_dir) as client:
        _watch(client, jobs, as_json=as_json)


@app.command()
def logs(
    job: Job, follow: Follow = False, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False
) -> None:
    """Print a job's log; with --json one JSON object a line."""
    from service.cli import render

    with connect(url, data_dir) as client, _interruptible(job):
        for line in client.logs(job, follow=follow):
            _print_line(line, render.log_line(line), as_json=as_json)


@app.command()
def events(
    job: Job, follow: Follow = False, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False
) -> None:
    """Print what happened to a job; with --json one JSON object a line."""
    from service.cli import render

    with connect(url, data_dir) as client, _interruptible(job):
        for event in client.events(job, follow=follow):
            _print_line(event, render.event_line(event), as_json=as_json)


@app.command()
def metrics(
    job: Job,
    key: Annotated[str | None, typer.Option(help="One metric, with its values.")] = None,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Show a job's curves; with --json every point."""
    from service.cli import render

    with connect(url, data_dir) as client:
        points = client.metrics(job, key=key)
    if as_json:
        print_json(_dump(points))
        return
    out.print(render.metrics_table(points))
    if key is not None and points:
        out.print(render.curve_table(points))


@app.command()
def cancel(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """End a job, with a checkpoint."""
    _ask(lambda client: client.cancel(job), url, data_dir, as_json=as_json)


@app.command()
def pause(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """Let a job save a checkpoint and give its workers back."""
    _ask(lambda client: client.pause(job), url, data_dir, as_json=as_json)


@app.command()
def resume(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """Queue a paused job again."""
    _ask(lambda client: client.resume(job), url, data_dir, as_json=as_json)


@app.command()
def retry(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """Queue a failed or cancelled job again, from its last checkpoint."""
    _ask(lambda client: client.retry(job), url, data_dir, as_json=as_json)


@app.command()
def artifacts(job: Job, url: Url = None, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """List a job's files."""
    from service.cli import render

    with connect(url, data_dir) as client:
        found = client.artifacts(job)
    if as_json:
        print_json(_dump(found))
    else:
        out.print(render.files_table(found))


@app.command()
def download(
    job: Job,
    path: Annotated[
        str,
        typer.Argument(metavar="[PATH]", help="Default: all but logs and checkpoints."),
    ] = "",
    to: Annotated[Path | None, typer.Option(help="Local folder; default: one of the job's name.")] = None,
    url: Url = None,
    data_dir: DataDir = DATA_DIR,
    as_json: Json = False,
) -> None:
    """Fetch a job's files, checked against their SHA-256."""
    from service.cli import files

    with connect(url, data_dir) as client:
        view = client.job(job)
        paths = files.download(client, view.id, path, to or Path(view.name), console=err)
    if as_json:
        print_json([str(file) for file in paths])
    else:
        for file in paths:
            out.print(str(file), markup=False, soft_wrap=True)


app.command()(garbage)


def main() -> None:
    """Entry point of the `cim` command."""
    # A terminal that cannot show a character should get a `?`, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    app()


def _watch(client: "Client", refs: list[str], *, as_json: bool) -> NoReturn:
    from service.cli.render import plain
    from service.cli.watch import display_for, status_of, watch
    from service.contracts.jobs import JobState

    with _interruptible(" ".join(refs)):
        jobs = watch(client, refs, display=display_for(err))
    for job in jobs:
        if job.state == JobState.FAILED:
            say(f"{job.name} failed: {plain(job.reason)}")
    if as_json:
        print_json(_dump(jobs))
    raise typer.Exit(status_of(jobs))


def _ask(wish: Callable[["Client"], "JobView"], url: str | None, data_dir: Path, *, as_json: bool) -> None:
    with connect(url, data_dir) as client:
        view = wish(client)
    if as_json:
        print_json(view.model_dump(mode="json"))
    else:
        out.print(f"{view.id}  {view.name}  {view.state}, {view.desired} wanted", markup=False)


@contextmanager
def _interruptible(refs: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped watching; the service goes on with the work. Watch again: cim watch {refs}")
        raise typer.Exit(INTERRUPTED) from None


def _print_line(item: "BaseModel", text: str, *, as_json: bool) -> None:
    if as_json:
        print_json_line(item.model_dump(mode="json"))
    else:
        out.print(text, markup=False, soft_wrap=True)


def _dump(items: Iterable["BaseModel"]) -> list[dict[str, Any]]:
    return [item.model_dump(mode="json") for item in items]
