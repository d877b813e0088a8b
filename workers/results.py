"""The documents that a job leaves beside its artifacts: spec.json, data/report.json, result.json."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cim_core
import workers
from service.contracts.jobs import FileEntry
from service.contracts.printable import printable
from service.contracts.work import Assignment
from workers.storage import JobStore, patiently

DISTRIBUTION = "cim-service"
LIBRARIES = ("numpy", "pillow", "pyarrow", "ray", "safetensors", "timm", "torch", "torchvision")


def spec_document(assignment: Assignment) -> dict[str, Any]:
    """What was asked and what ran it: enough to repeat the job elsewhere."""
    return {
        "job_id": assignment.job_id,
        "attempt": assignment.attempt,
        "submitted": assignment.submitted,
        "resolved": assignment.spec,
        "inputs": assignment.inputs,
        "code": code_version(),
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def code_version() -> dict[str, str]:
    """Release, and a digest of the sources: two builds of one release can differ."""
    digest = hashlib.sha256()
    for package in (cim_core, workers):
        assert package.__file__ is not None, "a regular package has a file"
        root = Path(package.__file__).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return {
        "distribution": DISTRIBUTION,
        "version": version(DISTRIBUTION),
        "source_sha256": digest.hexdigest(),
    }


def result_document(
    assignment: Assignment,
    *,
    step: int,
    metrics: Mapping[str, float],
    files: Sequence[FileEntry],
    table: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Final metrics and the manifest of every file; `table` holds an evaluation's rows."""
    document: dict[str, Any] = {
        "job_id": assignment.job_id,
        "kind": assignment.spec["kind"],
        "name": assignment.spec["name"],
        "attempt": assignment.attempt,
        "step": step,
        "metrics": dict(metrics),
    }
    if warnings:
        document["warnings"] = list(warnings)
    if table:
        document["table"] = [dict(row) for row in table]
    document["files"] = [entry.model_dump() for entry in sorted(files, key=lambda entry: entry.path)]
    return document


def put_json(store: JobStore, path: str, document: Mapping[str, Any]) -> FileEntry:
    """Store `document` as the job's file `path`, its texts `printable`. Raises `StoreError`."""
    return store.put_bytes(path, json.dumps(_printable(document), indent=1).encode())


def _printable(value: Any) -> Any:
    """JSON could carry half characters, but few readers of it take them."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(inner) for inner in value]
    return value


def earlier_files(store: JobStore, prefix: str, known: Sequence[FileEntry]) -> list[FileEntry]:
    """Manifest lines of what earlier attempts left below the job's `prefix`, beside `known`.

    Raises:
        StoreError: the store does not answer.
    """
    names = {entry.path for entry in known}
    found = []
    there = patiently(lambda: store.store.list(f"{store.prefix}/{prefix}"), what=f"listing {prefix}")
    for stored in there:
        path = stored.key.removeprefix(f"{store.prefix}/")
        if path not in names:
            data = patiently(partial(store.store.get_bytes, stored.key), what=f"reading {path}")
            digest = hashlib.sha256(data).hexdigest()
            found.append(FileEntry(path=path, size=len(data), sha256=digest))
    return found
