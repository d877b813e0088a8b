"""The data directory of embedded mode: what lies where, and who may use it."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from service.processes import replace_file


class FolderTakenError(Exception):
    """Another service runs on this data directory."""


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """The data directory of one embedded service."""

    path: Path  # absolute

    @classmethod
    def at(cls, path: Path) -> "DataFolder":
        """The one that a user names, `~` and relative paths included."""
        return cls(path=path.expanduser().absolute())

    def prepare(self) -> None:
        """Make what is missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.objects, self.mlflow, self.path / "logs"):
            folder.mkdir(exist_ok=True)

    @property
    def objects(self) -> Path:
        """The object store."""
        return self.path / "objects"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and artifacts."""
        return self.path / "mlflow"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.path / "cim.db"

    @property
    def database_url(self) -> str:
        """The address of that file."""
        return f"sqlite+aiosqlite:///{self.database}"

    @property
    def record(self) -> Path:
        """Children and ports, as long as there are children."""
        return self.path / "processes.json"

    @property
    def announcement(self) -> Path:
        """Where clients find the service, as long as it is ready."""
        return self.path / "service.json"

    @property
    def ray_token(self) -> Path:
        """The token that opens the Ray head."""
        return self.path / "ray_token"

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.path / "logs" / f"{name}.log"

    def secret(self, name: str) -> str:
        """Random text that stays the same, readable by this user alone; made where there is none."""
        path = self.path / name
        if not path.exists():
            replace_file(path, secrets.token_hex(32))
        return path.read_text()

    def announce(self, content: str) -> None:
        """Tell every client that looks here where the service is."""
        replace_file(self.announcement, content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second service out for as long as this one lives, however it ends.

        Raises:
            FolderTakenError: one is here already.
        """
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderTakenError(self._taken_by(file)) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _taken_by(self, file: TextIO) -> str:
        file.seek(0)
        pid = file.read().strip() or "unknown"
        told = f"a service already runs on {self.path} (process {pid})"
        return f"{told}; stop it with `kill {pid}`, or choose another folder with --data-dir"
