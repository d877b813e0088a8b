"""`cim garbage`: what may go of the files of a service on this machine."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.cli.connect import USAGE, say


def garbage(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; without this nothing is touched.")
    ] = False,
    data_dir: Annotated[
        Path,
        typer.Option("--data-dir", envvar="CIM_DATA_DIR", help="Folder of a service on this machine."),
    ] = Path(".cim"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show checkpoints beyond their retention and leftovers of dead attempts; the service need not run."""
    if importlib.util.find_spec("sqlalchemy") is None:
        say("this installation holds the client alone; install cim-service[all] where the service is")
        raise typer.Exit(USAGE)
    command = [sys.executable, "-m", "service", "garbage", "--data-dir", str(data_dir)]
    command += ["--delete"] if delete else []
    command += ["--json"] if as_json else []
    os.execv(sys.executable, command)  # noqa: S606  the service's own command takes this process's place
