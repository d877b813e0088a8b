"""Artifacts: listing them and fetching them with a bar of bytes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from service.client import Client

OnBytes = Callable[[int, int], None]
# Large, and of no use outside the service, so fetched only when asked for by name.
LEFT_OUT = ("attempts", "logs")


def download(client: Client, ref: str, path: str, folder: Path, *, console: Console) -> list[Path]:
    """Fetch `path` of a job, or all its results, into `folder`. Returns the local files."""
    with _bytes_shown(console) as on_progress:
        if path.strip("/"):
            return client.download(ref, path, folder, on_progress=on_progress)
        tops = sorted({entry.path.split("/")[0] for entry in client.artifacts(ref)} - set(LEFT_OUT))
        return [
            file
            for top in tops or [""]
            for file in client.download(ref, top, folder, on_progress=on_progress)
        ]


def _bytes_shown(console: Console) -> AbstractContextManager[OnBytes]:
    return _bar(console) if console.is_terminal else _nothing()


@contextmanager
def _bar(console: Console) -> Iterator[OnBytes]:
    columns = (TextColumn("download"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("download", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _nothing() -> Iterator[OnBytes]:
    yield lambda _done, _total: None
