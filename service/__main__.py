"""`python -m service COMMAND`: the entry points, and the only reader of the environment.

Each command imports what it needs by itself, so that `--help` and a wrong option answer at once.
"""

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.dispatch.tracker import Tracker
    from service.settings import Settings

_USAGE = 2
_LOG_BYTES = 10 * 2**20
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# An outage of MLflow may cost the dispatcher seconds, not the minutes of MLflow's own defaults.
_MLFLOW_CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = _parser().parse_args(arguments)
    from service.settings import SettingsError

    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "up": _up,
        "api": _api,
        "dispatcher": _dispatcher,
        "migrate": _migrate,
        "garbage": _garbage,
    }
    try:
        return commands[given.command](given)
    except SettingsError as error:
        print(f"service {given.command}: {error}", file=sys.stderr)  # noqa: T201
        return _USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description="The control plane.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="everything on this machine: api, dispatcher, Ray, MLflow")
    up.add_argument("--port", type=_port, help="of the api (8000); 0 for any free one")
    up.add_argument("--mlflow-port", type=_port, help="of MLflow (5000); 0 for any free one")
    up.add_argument("--data-dir", type=Path, default=Path(".cim"), help="where everything is kept (.cim)")
    up.add_argument("--json", action="store_true", help="one line of JSON on stdout when ready")
    commands.add_parser("api", help="the REST interface, from CIM_... settings")
    commands.add_parser("dispatcher", help="the reconcile loop, from CIM_... settings")
    migrate = commands.add_parser("migrate", help="bring the database to the present schema")
    migrate.add_argument("--data-dir", type=Path, help="that of `cim up`; else CIM_DATABASE_URL")
    garbage = commands.add_parser("garbage", help="what may go of the stored files, from CIM_... settings")
    garbage.add_argument("--delete", action="store_true", help="remove it; without this nothing is touched")
    garbage.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    garbage.add_argument("--data-dir", type=Path, help="of an embedded service, in place of the settings")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"a port lies between 0 and 65535, got {port}")
    return port


def _up(given: argparse.Namespace) -> int:
    from service.data_folder import FolderTakenError
    from service.db.upgrade import SchemaError
    from service.embedded import UpError, UpOptions, up
    from service.serving import serve_both
    from service.settings import check_environment

    async def serve(
        settings: "Settings", bound: socket.socket, stop: asyncio.Event, on_ready: Callable[[], None]
    ) -> None:
        _log_to_file(settings.data_dir / "logs" / "service.log")
        await serve_both(
            settings, bound, stop, open_tracker=_open_tracker, on_ready=on_ready, tell=_say_on_stderr
        )

    check_environment()
    options = UpOptions(
        data_dir=given.data_dir, port=given.port, mlflow_port=given.mlflow_port, as_json=given.json
    )
    try:
        asyncio.run(up(options, environ=os.environ, serve=serve))
    except (UpError, FolderTakenError, SchemaError) as error:
        return _failed(error, command="cim up")
    return 0


def _api(_: argparse.Namespace) -> int:
    from service.serving import serve_api
    from service.settings import from_environment

    _log_to_stderr()
    return _until_schema_fault(serve_api(from_environment()))


def _dispatcher(_: argparse.Namespace) -> int:
    from service.serving import serve_dispatcher
    from service.settings import from_environment

    _log_to_stderr()
    return _until_schema_fault(serve_dispatcher(from_environment(), open_tracker=_open_tracker))


def _until_schema_fault(server: Coroutine[Any, Any, None]) -> int:
    from service.db.upgrade import SchemaError

    try:
        asyncio.run(server)
    except SchemaError as error:
        return _failed(error)
    return 0


def _migrate(given: argparse.Namespace) -> int:
    from service.data_folder import DataFolder, FolderTakenError
    from service.db.upgrade import SchemaError, upgrade

    _log_to_stderr()
    try:
        if given.data_dir is not None:
            folder = DataFolder.at(given.data_dir)
            with folder.locked():
                upgrade(folder.database_url)
        elif (url := os.environ.get("CIM_DATABASE_URL")) is not None:
            upgrade(url)
        else:
            return _failed("give --data-dir, or the database's address in CIM_DATABASE_URL")
    except FileNotFoundError:
        return _failed(f"there is no data directory {given.data_dir}")
    except (SchemaError, FolderTakenError) as error:
        return _failed(error)
    return 0


def _failed(why: object, *, command: str = "cim") -> int:
    print(f"{command}: {why}", file=sys.stderr)  # noqa: T201
    return 1


def _garbage(given: argparse.Namespace) -> int:
    from service.data_folder import DataFolder
    from service.garbage import GarbageError, collect, storage_of
    from service.settings import storage_from_environment

    _log_to_stderr()
    try:
        if given.data_dir is None:
            storage = storage_from_environment()
        else:
            storage = storage_of(DataFolder.at(given.data_dir))
        asyncio.run(collect(storage, deletes=given.delete, as_json=given.json))
    except GarbageError as error:
        return _failed(error, command="garbage")
    return 0


def _open_tracker(settings: "Settings") -> "Tracker":
    """MLflow, whose client takes its limits from the environment and seconds to load."""
    for name, value in _MLFLOW_CLIENT.items():
        os.environ.setdefault(name, value)
    from service.dispatch.mlflow_tracker import MlflowTracker

    assert settings.mlflow_url is not None, "asked for a tracker without an address"
    return MlflowTracker(settings.mlflow_url, experiment=settings.mlflow_experiment)


def _say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _log_to_file(path: Path) -> None:
    """Everything into a file that cannot grow without end; stderr belongs to the user."""
    # A name that UTF-8 cannot hold is written as an escape.
    handler = RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=3, encoding="utf-8", errors="backslashreplace"
    )
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[handler])
    _quieten()


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    _quieten()


def _quieten() -> None:
    # One line a request, and the dispatcher asks Ray every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
