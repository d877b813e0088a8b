"""Checkpoints: all that a resume needs, real only once the service knows its manifest.

Order: files, then `manifest.json`, then the commit at the service. A worker that dies in between
leaves files that nobody reads. Nothing is deleted here: only the service knows what is still named.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cim_core.engine.state import Snapshot, TrainState, load_state, take_snapshot
from service.contracts.jobs import FileEntry
from service.contracts.work import Checkpoint
from service.store.base import CorruptObjectError, check_file
from workers.cache import locked
from workers.reporting import insistently
from workers.storage import JobStore

log = logging.getLogger(__name__)

METRICS = "metrics.json"


class Commits(Protocol):
    """The part of the service that makes a checkpoint real."""

    def commit_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raises `StaleAttempt` when a newer attempt owns the job."""
        ...


class CheckpointWriter:
    """Saves and commits the checkpoints of one attempt, on rank 0."""

    def __init__(self, store: JobStore, service: Commits, *, fingerprint: Mapping[str, Any]) -> None:
        self._store, self._service, self._fingerprint = store, service, dict(fingerprint)

    def snapshot(self, state: TrainState) -> Snapshot:
        """A copy of `state` to be saved while training goes on."""
        return take_snapshot(state, fingerprint=self._fingerprint)

    def save(self, snapshot: Snapshot, *, step: int, metrics: Mapping[str, float]) -> Checkpoint:
        """Write what was copied after `step` steps and commit it; `metrics` are the latest of each.

        Raises:
            StaleAttempt: a newer attempt owns the job; nothing more may be written.
            StoreError: the store stayed away, or is full.
        """
        prefix = f"{self._store.attempt_prefix}/checkpoints/step-{step}"
        with tempfile.TemporaryDirectory(prefix="cim-checkpoint-") as folder:
            snapshot.write(Path(folder))
            (Path(folder) / METRICS).write_text(json.dumps(dict(metrics)), encoding="utf-8")
            files = self._store.put_folder(prefix, Path(folder))
        manifest = {"step": step, "files": [entry.model_dump() for entry in files]}
        last = self._store.put_bytes(f"{prefix}/manifest.json", json.dumps(manifest, indent=1).encode())
        checkpoint = Checkpoint(step=step, prefix=prefix, files=[*files, last])
        insistently(lambda: self._service.commit_checkpoint(checkpoint))
        log.info("checkpoint committed at step %d", step)
        return checkpoint


def fetch(checkpoint: Checkpoint, store: JobStore, folder: Path) -> Path:
    """Download `checkpoint` below `folder` once a node and verify every file of its manifest.

    Raises:
        MissingObjectError, CorruptObjectError: a file is not what the manifest says.
        StoreError: the store stayed away.
    """
    target = folder / f"checkpoint-{checkpoint.step}"
    with locked(target):
        for entry in checkpoint.files:
            name = entry.path.removeprefix(f"{checkpoint.prefix}/")
            _fetch_one(entry, store, target / name)
    return target


def restore(state: TrainState, folder: Path, *, fingerprint: Mapping[str, Any]) -> dict[str, float]:
    """Load the download in `folder` into `state`; the latest metrics at that step.

    Raises:
        CheckpointMismatchError: it belongs to another configuration or to other images.
    """
    load_state(state, folder, fingerprint=fingerprint)
    metrics: dict[str, float] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return metrics


def _fetch_one(entry: FileEntry, store: JobStore, file: Path) -> None:
    if file.is_file():
        try:
            check_file(file, entry)
        except CorruptObjectError:
            file.unlink()
        else:
            return
    store.get_file(entry.path, file)
    check_file(file, entry)
