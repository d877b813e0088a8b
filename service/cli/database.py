"""`cim db`: the database of a service on this machine, or the one of CIM_DATABASE_URL."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look after the database.")


@app.command()
def upgrade(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="CIM_DATA_DIR",
            help="Folder of a service that is stopped.",
            show_default=".cim, or CIM_DATABASE_URL",
        ),
    ] = None,
) -> None:
    """Bring the database to the schema of this version. Doing it twice is harmless; make a backup before."""
    command = [sys.executable, "-m", "service", "migrate"]
    if data_dir is not None or "CIM_DATABASE_URL" not in os.environ:
        command += ["--data-dir", str(data_dir or ".cim")]
    os.execv(sys.executable, command)  # noqa: S606  the service takes this process's place
