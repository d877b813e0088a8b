"""Every mistake gets a clear message, loses nothing, and leaves the service serving."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client.errors import ApiError
from service.contracts.jobs import JobView
from tests.acceptance.embedded import Embedded, specs

Spec = dict[str, Any]


def _vit(**changes: Any) -> Spec:
    return specs.pretrain("bad", "fake", enhancer=specs.VIT, objective="respix", **changes)


def _model(**changes: Any) -> Spec:
    spec = _vit()
    return {**spec, "model": {**spec["model"], **changes}}


def _training(**changes: Any) -> Spec:
    return _vit(training=specs.training(20, **changes))


REFUSED: list[tuple[str, Spec, str, str]] = [
    ("unknown_key", _training(batchsize=3), "training.batchsize", "batch_size"),
    ("wrong_type", _training(batch_size="many"), "training.batch_size", "many"),
    ("impossible_value", _model(masking={"min_ratio": 1.4}), "model.masking.min_ratio", "1.4"),
    ("missing_folder", _vit(data={"uri": "/no/such/folder"}), "data.uri", "/no/such/folder"),
    ("relative_folder", _vit(data={"uri": "photos"}), "data.uri", "absolute"),
    (
        "unknown_timm_name",
        _model(enhancer={"name": "vit_tinny_patch16_224"}),
        "model.enhancer.name",
        "vit_tiny",
    ),
    (
        "sharing_asked_of_a_cnn",
        _model(enhancer={"name": "resnet18", "shared_blocks": 2}),
        "model.enhancer.shared_blocks",
        "resnet18",
    ),
    ("image_size_not_divisible", _model(image_size=100, patch_size=16), "model.image_size", "16"),
    ("unknown_tokenizer_job", _model(tokenizer={"source": "job:nobody"}), "model.tokenizer.source", "nobody"),
    ("no_tokenizer", _model(tokenizer={}), "model.tokenizer.source", "required"),
]


@pytest.mark.parametrize(("spec", "path", "hint"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_submit__refuses_what_can_be_known(embedded: Embedded, spec: Spec, path: str, hint: str) -> None:
    before = len(list(embedded.client.jobs()))
    with pytest.raises(ApiError) as refused:
        embedded.client.submit([spec])

    assert refused.value.status == 422
    lessons = {error.path: error.message for error in refused.value.problem.errors}
    assert hint.lower() in lessons[path].lower()
    assert len(list(embedded.client.jobs())) == before


def test_submit__an_empty_folder_is_refused(embedded: Embedded, tmp_path: Path) -> None:
    with pytest.raises(ApiError) as refused:
        embedded.client.submit([_vit(data={"uri": str(tmp_path)})])
    assert refused.value.problem.errors[0].path == "data.uri"


def test_submit__all_mistakes_are_told_at_once(embedded: Embedded) -> None:
    spec = _model(image_size=100, patch_size=16, masking={"min_ratio": 1.4})
    with pytest.raises(ApiError) as refused:
        embedded.client.submit([{**spec, "priorty": 3}])
    paths = {error.path for error in refused.value.problem.errors}
    assert {"priorty", "model.masking.min_ratio"} <= paths


def _fails(embedded: Embedded, spec: Spec) -> JobView:
    (job,) = embedded.client.submit([spec])
    job = embedded.until(job.id, lambda view: view.state in ("failed", "succeeded", "cancelled"))
    assert job.state == "failed"
    assert job.failure_kind == "user"
    assert len(job.attempts) == 1
    return job


@pytest.mark.slow
def test_nothing_decodes__is_told_with_a_reason_for_each_file(embedded: Embedded, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "broken image ü.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (tmp_path / "empty.png").touch()
    job = _fails(embedded, specs.tokenizer("nothing-decodes", data={"uri": str(tmp_path)}))

    assert "data.uri" in job.reason
    report = json.loads(embedded.client.read(job.id, "data/report.json"))
    assert {entry["path"] for entry in report["skipped"]} == {"notes.txt", "broken image ü.jpg", "empty.png"}
    assert all(entry["reason"] for entry in report["skipped"])

    with pytest.raises(ApiError) as refused:
        embedded.client.submit([_model(tokenizer={"source": "job:nothing-decodes"})])
    assert refused.value.problem.errors[0].path == "model.tokenizer.source"
    assert "failed" in refused.value.problem.errors[0].message


@pytest.mark.slow
def test_batch_larger_than_the_data__names_the_key_to_lower(embedded: Embedded) -> None:
    job = _fails(embedded, specs.tokenizer("big-batch", training=specs.training(5, batch_size=100_000)))
    assert "training.batch_size" in job.reason
    assert "100000" in job.reason.replace(",", "")


@pytest.mark.slow
def test_waiting_job__fails_clearly_when_the_one_it_needs_fails(embedded: Embedded) -> None:
    first = specs.tokenizer("doomed", training=specs.training(5, batch_size=100_000))
    second = specs.pretrain("waits", "job:doomed", enhancer=specs.VIT, objective="respix")
    jobs = embedded.client.submit([first, second])
    failed = embedded.until(jobs[1].id, lambda view: view.state == "failed")
    assert failed.failure_kind == "user"
    assert "doomed" in failed.reason
    assert failed.attempts == []


@pytest.fixture
def full_store(embedded: Embedded) -> Iterator[Path]:
    """A file system of 256 kB over the folder in which the store keeps the files of jobs."""
    folder = embedded.data_dir / "objects" / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_in_the_object_store__ends_the_job_and_says_where(
    embedded: Embedded, full_store: Path
) -> None:
    job = _fails(embedded, specs.tokenizer("full-disk"))
    assert str(full_store.parent) in job.reason
    assert "no space is left" in job.reason


def test_service__goes_on_serving_after_a_refusal(embedded: Embedded) -> None:
    with pytest.raises(ApiError):
        embedded.client.submit([_training(batchsize=3)])
    assert embedded.client.validate([_vit()]).resolved
