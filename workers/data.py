"""Before training: which images there are, what of them is used, and how many steps that makes."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from cim_core.config import FREE_ON_RESUME, TrainingConfig
from cim_core.data.index import Index, NoUsableImageError, OnProgress, scan
from cim_core.data.unreadable import mendable, shortened
from cim_core.durations import Plan, plan
from cim_core.errors import DataError
from cim_core.seeding import generator_for
from service.contracts.jobs import FileEntry
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec
from workers.attempt import AnySpec, Attempt, Work, plan_document
from workers.rank import Rank
from workers.reporting import Reporter
from workers.results import put_json, spec_document
from workers.storage import JobStore

log = logging.getLogger(__name__)

REPORT = "data/report.json"
MOST_HELD_OUT = 256
HELD_OUT_SHARE = 20  # one image in so many


def prepare(attempt: Attempt, store: JobStore, *, reporter: Reporter, go_on: Callable[[], None]) -> Work:
    """Read the images and resolve the plan; leaves spec.json and data/report.json in the store.

    Raises:
        DataError: images are missing, unusable, fewer than a batch, or not labelled where they must be.
        Whatever `go_on` raises between the image sets.
    """
    reporter.say("reading images")
    files = [_keep(store, "spec.json", spec_document(attempt.assignment), reporter=reporter)]
    indices: dict[str, Index] = {}
    for role, uri in attempt.image_sets.items():
        indices[role] = _read(attempt, store, uri, reporter=reporter)
        go_on()
    report = data_report({role: index.report() for role, index in indices.items()})
    files.append(_keep(store, REPORT, report, reporter=reporter))
    check_labels(indices)
    work = Work(
        attempt=attempt,
        indices={role: index.to_json() for role, index in indices.items()},
        plan=_plan(attempt.spec, indices),
        files=files,
    )
    if work.plan is not None:
        reporter.plan(plan_document(work.plan))
    return work


def _keep(store: JobStore, path: str, document: Mapping[str, Any], *, reporter: Reporter) -> FileEntry:
    """Store a document and announce it at once: whoever reads why a job failed wants it too."""
    entry = put_json(store, path, document)
    reporter.file(entry)
    return entry


def index_of(rank: Rank, role: str) -> Index:
    """An image set as the driver found it; its files are brought to this node where they are not here.

    Raises:
        StoreError: the images' store stayed away.
    """
    attempt = rank.attempt
    attempt.downloads.images(attempt.image_sets[role])
    return Index.from_json(rank.work.indices[role])


def data_report(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One report over all sets; each set's own below `sets` where there are several."""
    parts = list(reports.values())
    total: dict[str, Any] = {
        "counted": sum(part["counted"] for part in parts),
        "used": sum(part["used"] for part in parts),
        "skipped": [line for part in parts for line in part["skipped"]],
    }
    if len(parts) > 1:
        total["sets"] = dict(reports)
    return total


def check_labels(indices: Mapping[str, Index]) -> None:
    """Raise `DataError` unless the labelled sets are, and agree in their classes."""
    for train, val in (("train", "val"), ("probe_train", "probe_val")):
        if train not in indices:
            continue
        for role in (train, val):
            if not indices[role].classes:
                raise DataError(
                    f"{_key(role)}: labelled images must lie at CLASS/FILE, one folder a class; in "
                    f"{indices[role].root} at least one lies elsewhere"
                )
        if indices[train].classes != indices[val].classes:
            only = sorted(set(indices[train].classes) ^ set(indices[val].classes))
            raise DataError(
                f"{_key(train)} and {_key(val)} must hold the same classes; in one of them alone: "
                f"{', '.join(only[:10])}"
            )


def held_out(index: Index, *, seed: int) -> tuple[Index, Index]:
    """`index` as (for training, held out): one image in 20, at least 1 and at most 256, by the seed.

    Raises:
        DataError: a single image cannot be in both.
    """
    num = len(index)
    if num < 2:
        raise DataError("data.uri: one usable image is too few: one is held out, the rest is trained on")
    order = torch.randperm(num, generator=generator_for(seed, "held-out")).tolist()
    away = set(order[: min(MOST_HELD_OUT, max(1, num // HELD_OUT_SHARE))])
    kept = tuple(entry for place, entry in enumerate(index.entries) if place not in away)
    out = tuple(entry for place, entry in enumerate(index.entries) if place in away)
    return replace(index, entries=kept), replace(index, entries=out)


def fingerprint(work: Work) -> dict[str, Any]:
    """What a checkpoint must share with the attempt that resumes from it."""
    spec = work.attempt.spec
    assert not isinstance(spec, EvaluateSpec), "nothing is resumed in an evaluation"
    resolved = spec.model_dump(mode="json")
    training = {key: value for key, value in resolved["training"].items() if key not in FREE_ON_RESUME}
    return {
        "kind": spec.kind,
        "model": resolved["model"],
        "training": training,
        "inputs": dict(work.attempt.assignment.inputs)
        | ({"dall-e": work.tokenizer} if work.tokenizer else {}),
        "images": digest(Index.from_json(work.indices["data"])),
    }


def digest(index: Index) -> str:
    """SHA-256 over names and sizes of all images in their order, wherever they lie."""
    names = [[entry.name, entry.size_bytes, entry.width, entry.height] for entry in index.entries]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _read(attempt: Attempt, store: JobStore, uri: str, *, reporter: Reporter) -> Index:
    def fetched(done: int, total: int) -> None:
        reporter.say(f"fetching images: {done} of {total}")

    def seen(done: int, total: int) -> None:
        reporter.say(f"reading images: {done} of {total}")

    path = replace(attempt.downloads, on_file=fetched).images(uri)
    try:
        index = _scanned(path, on_progress=seen)
    except NoUsableImageError as error:
        reporter.file(put_json(store, REPORT, data_report({"data": error.report})))
        raise
    log.info("%s: %d usable images, %d files skipped", uri, len(index), len(index.skipped))
    return index


def _scanned(path: str, *, on_progress: OnProgress) -> Index:
    """As `scan`; what it dies of whenever it reads the same files is a DataError."""
    told = f"data.uri: {shortened(path)}"
    try:
        with mendable(told, remedy="make it readable to the user that the workers run as"):
            return scan(path, on_progress=on_progress)
    except (UnicodeError, RecursionError) as error:
        raise DataError(f"{told} cannot be read: {error}; give a simpler folder, or a .tar") from error


def _plan(spec: AnySpec, indices: Mapping[str, Index]) -> Plan | None:
    match spec:
        case TokenizerSpec():
            return _planned(spec.training, held_out(indices["data"], seed=spec.training.seed)[0])
        case PretrainSpec():
            return _planned(spec.training, indices["data"])
        case EvaluateSpec():
            return None


def _planned(training: TrainingConfig, index: Index) -> Plan:
    return plan(training, num_images=len(index))


def _key(role: str) -> str:
    """The spec's key of an image set."""
    return role.replace("_", ".") if role.startswith("probe") else f"data.{role}"
