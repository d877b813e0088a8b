"""How a command finds the service and speaks to it, and how its errors reach the user."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from service.cli.specs import Spec, SpecFileError

if TYPE_CHECKING:
    from service.client import Client

ADDRESS_FILE = "service.json"  # written into the data directory by `cim up`

FAILED = 1
USAGE = 2
INTERRUPTED = 130
WRONG_INPUT = (400, 422)

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


class NoServiceError(Exception):
    """No address of a service is known."""


def connect(url: str | None, data_dir: Path) -> "Client":
    """A client of the service at `url`, or of the one that runs on `data_dir`.

    Raises:
        NoServiceError: Neither is known.
    """
    from service.client import Client

    try:
        return Client(url or _address(data_dir), refused_is_final=True)
    except ValueError as error:
        raise NoServiceError(str(error)) from error


def _address(data_dir: Path) -> str:
    path = data_dir.expanduser().absolute() / ADDRESS_FILE
    try:
        return str(json.loads(path.read_text("utf-8"))["api"])
    except FileNotFoundError as error:
        raise NoServiceError(
            f"no service is known: {path} does not exist; start one with `cim up`, "
            "or name a running one with --url or CIM_URL, or its folder with --data-dir or CIM_DATA_DIR"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoServiceError(f"{path} does not tell the service's address: {error!r}") from error


class Commands(TyperGroup):
    """The command group: turns errors that users can cause into lines and exit statuses."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its expected errors end it with a message instead of a traceback."""
        from service.client.errors import ApiError, CorruptDownloadError

        try:
            return super().invoke(ctx)
        except ApiError as error:
            say(error)
            ctx.exit(USAGE if error.status in WRONG_INPUT else FAILED)
        except (SpecFileError, NoServiceError) as error:
            say(error)
            ctx.exit(USAGE)
        except CorruptDownloadError as error:
            say(error)
            ctx.exit(FAILED)


@contextmanager
def naming(specs: Sequence[Spec]) -> Iterator[None]:
    """Let the service's refusal of these specs call them by name: `street: ` for `[1].`."""
    from service.client.errors import ApiError

    def name(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"{specs[number].get('name')}: " if number < len(specs) else match[0]

    try:
        yield
    except ApiError as error:
        if error.status not in WRONG_INPUT:
            raise
        raise SpecFileError(re.sub(r"^\[(\d+)\]\.", name, str(error), flags=re.MULTILINE)) from error


def say(message: object) -> None:
    """One or more lines for the user on standard error, so that standard output stays data."""
    err.print(str(message), markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1))


def print_json_line(value: object) -> None:
    """One JSON document on one line of standard output, sent at once."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
