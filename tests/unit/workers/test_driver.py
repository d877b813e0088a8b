"""The driver up to the point where Ray comes in; tests/integration/test_workers.py has the rest."""

import errno
import json
import logging
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ray.train.v2._internal.state.schema import RunSettings

from service.client.errors import ApiError, api_error
from service.contracts.jobs import FailureKind
from service.contracts.problems import Problem
from service.contracts.work import Assignment, Finish, StoreAddress
from service.store.base import StoreError
from service.store.directory import DirectoryStore
from tests.fakes.work_client import FakeWork
from workers import driver
from workers.attempt import Outcome, Work
from workers.failures import AttemptFailedError, AttemptStaleError, ExitCode
from workers.official import OfficialTokenizer
from workers.settings import UsageError, WorkerSettings


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def work(tmp_path: Path, photos: Path) -> FakeWork:
    training = {"steps": 4, "batch_size": 2}
    spec = {"kind": "tokenizer", "name": "t", "data": {"uri": str(photos)}, "training": training}
    address = StoreAddress(url=str(tmp_path / "store"))
    return FakeWork(
        Assignment(job_id="ab", attempt=1, spec=spec, inputs={}, store=address, report_every_s=0.01)
    )


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(url="http://x", job_id="ab", attempt=1, code="c0de", cache_dir=tmp_path / "cache")


def run(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, *, ranks: Any = None
) -> ExitCode:
    def train(*_: object) -> Outcome:
        if isinstance(ranks, Exception):
            raise ranks
        assert isinstance(ranks, Outcome)
        return ranks

    monkeypatch.setattr(driver, "WorkClient", lambda *_: work)
    if ranks is not None:
        monkeypatch.setattr(driver, "connect", lambda _: None)
        monkeypatch.setattr(driver, "_train", train)
    return driver.run(settings)


def test_run__success_is_told_with_what_the_ranks_returned(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = Outcome(stopped=False, step=4, total_steps=4, metrics={"val_psnr": 20.0})
    assert run(work, settings, monkeypatch, ranks=outcome) is ExitCode.DONE
    (finish,) = work.finishes
    assert (finish.outcome, finish.step, finish.metrics) == ("succeeded", 4, {"val_psnr": 20.0})
    assert work.reports[-1].progress.message == "starting 1 worker"
    logs = "".join(file.read_text() for file in (tmp_path / "store/jobs/ab/logs/attempt-1").iterdir())
    assert "succeeded at step 4" in [json.loads(line)["message"] for line in logs.splitlines()]


def test_run__a_success_whose_files_the_service_does_not_find_is_a_failure_of_the_store(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = work.finish

    def look(finish: Finish) -> None:
        take(finish)
        if finish.outcome == "succeeded":
            detail = "encoder/model.safetensors differs from its manifest"
            raise api_error(Problem(title="", status=409, code="broken_manifest", detail=detail))

    monkeypatch.setattr(work, "finish", look)
    outcome = Outcome(stopped=False, step=4, total_steps=4)
    assert run(work, settings, monkeypatch, ranks=outcome) is ExitCode.STORAGE
    success, failure = work.finishes
    assert (success.outcome, failure.outcome, failure.step) == ("succeeded", "failed", 4)
    assert failure.failure is not None
    assert failure.failure.kind is FailureKind.STORAGE
    assert "encoder/model.safetensors differs" in failure.failure.message


def test_run__a_success_waits_for_a_store_that_takes_no_log_lines(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_bytes, refused = DirectoryStore.put_bytes, list[str]()

    def put(store: DirectoryStore, key: str, data: bytes) -> None:
        if "/logs/" in key and len(refused) < 6:
            refused.append(key)
            raise StoreError("away")
        put_bytes(store, key, data)

    monkeypatch.setattr(DirectoryStore, "put_bytes", put)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert (
        run(work, settings, monkeypatch, ranks=Outcome(stopped=False, step=4, total_steps=4)) is ExitCode.DONE
    )
    logs = "".join(file.read_text() for file in (tmp_path / "store/jobs/ab/logs/attempt-1").iterdir())
    assert "succeeded at step 4" in logs
    assert not (settings.cache_dir / "ab").exists()


def test_run__the_attempt_is_claimed_before_anything_else(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: str) -> None:
        raise ApiError(Problem(title="", status=409, code="attempt_claimed", detail="another worker has it"))

    assert run(work, settings, monkeypatch, ranks=Outcome(stopped=True, step=0)) is ExitCode.DONE
    assert work.claims == ["c0de"]
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setattr(work, "claim", refuse)
    assert run(work, settings, monkeypatch) is ExitCode.INFRASTRUCTURE
    assert len(work.finishes) == 1
    assert not (tmp_path / "store").exists()


def test_run__neither_code_nor_token_is_on_the_pages_of_ray_or_in_the_log(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handed: list[Work] = []

    def train(work: Work, _: object) -> Outcome:
        handed.append(work)
        logging.getLogger("workers.somewhere").info("said %s and %s", settings.code, settings.token)
        return Outcome(stopped=True, step=0)

    monkeypatch.setattr(driver, "WorkClient", lambda *_: work)
    monkeypatch.setattr(driver, "connect", lambda _: None)
    monkeypatch.setattr(driver, "_train", train)
    assert driver.run(settings) is ExitCode.DONE
    # What the state of a Ray Train run keeps of what every rank is handed.
    shown = json.dumps(RunSettings._sanitize_train_loop_config({"work": handed[0]}))
    logs = "".join(file.read_text() for file in (tmp_path / "store/jobs/ab/logs/attempt-1").iterdir())
    assert "job_id='ab'" in shown
    assert "said *** and ***" in logs
    for secret in (settings.code, settings.token):
        assert secret not in shown
        assert secret not in logs
    assert handed[0].attempt.settings.token == settings.token


def test_run__a_ranks_sentence_and_step_reach_the_service(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = AttemptFailedError("user", "step 3: the loss is not finite", 3)
    assert run(work, settings, monkeypatch, ranks=told) is ExitCode.USER
    (finish,) = work.finishes
    assert finish.failure is not None
    assert (finish.failure.message, finish.step) == ("step 3: the loss is not finite", 3)


def test_run__a_stale_attempt_tells_nothing(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(work, settings, monkeypatch, ranks=AttemptStaleError("over")) is ExitCode.STALE
    assert work.finishes == []


def test_run__a_job_that_is_over_is_not_begun(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work.stale = True
    assert run(work, settings, monkeypatch) is ExitCode.STALE
    assert not (tmp_path / "store").exists()


def test_run__missing_data_is_the_users(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    photos.rename(photos.with_name("elsewhere"))
    assert run(work, settings, monkeypatch) is ExitCode.USER
    failure = work.finishes[0].failure
    assert failure is not None
    assert failure.kind is FailureKind.USER
    assert "does not exist" in failure.message


def test_run__a_spec_that_this_release_does_not_take_is_the_users_to_submit_again(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stored by another release: one line for each mistake, and no second attempt."""
    assert work.assigned is not None
    bad = {"training": {"steps": 4, "batch_size": 0, "clip_norm": -1.5}, "model": {"width": "s3cret@host"}}
    work.assigned = work.assigned.model_copy(update={"spec": {**work.assigned.spec, **bad}})
    assert run(work, settings, monkeypatch) is ExitCode.USER
    (finish,) = work.finishes
    assert finish.failure is not None
    assert finish.failure.kind is FailureKind.USER
    first, *lines = finish.failure.message.splitlines()
    assert "submit the spec again" in first
    assert "version" in first
    assert sorted(lines)[1:] == [
        "training.batch_size: must lie between 1 and 1048576, got 0",
        "training.clip_norm: must lie between 0 and 1000000, got -1.5",
    ]
    assert "model.width: must be a valid integer" in sorted(lines)[0]


@pytest.mark.parametrize("kind", [None, "segment", ["tokenizer"], {}])
def test_run__a_kind_that_this_release_does_not_know(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, kind: object
) -> None:
    assert work.assigned is not None
    work.assigned = work.assigned.model_copy(update={"spec": {**work.assigned.spec, "kind": kind}})
    assert run(work, settings, monkeypatch) is ExitCode.USER
    failure = work.finishes[0].failure
    assert failure is not None
    assert "kind: must be one of tokenizer, pretrain, evaluate" in failure.message


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RecursionError("maximum recursion depth exceeded"),
        PermissionError(errno.EACCES, "Permission denied", "/photos/x"),
        OSError(errno.ELOOP, "Too many levels of symbolic links", "/photos/x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_run__what_reading_the_images_dies_of_is_the_users(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, photos: Path, error: Exception
) -> None:
    def scan(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("workers.data.scan", scan)
    assert run(work, settings, monkeypatch) is ExitCode.USER
    failure = work.finishes[0].failure
    assert failure is not None
    assert failure.message.startswith(f"data.uri: {photos} cannot be read: ")


def test_run__a_disk_that_fails_is_tried_again(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("workers.data.scan", scan)
    assert run(work, settings, monkeypatch) is ExitCode.INFRASTRUCTURE


@pytest.mark.parametrize("content", ["nothing", "zeros", "a cut picture"])
def test_run__an_only_tar_that_is_empty_or_cut_is_the_users(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, photos: Path, content: str
) -> None:
    with tarfile.open(photos / "a.tar", "w") as tar:
        tar.add(photos / "1.png")
    whole = (photos / "a.tar").read_bytes()
    contents = {"nothing": b"", "zeros": bytes(10240), "a cut picture": whole[:530]}
    (photos / "a.tar").write_bytes(contents[content])
    assert work.assigned is not None
    for uri in (photos / "a.tar", f"{photos}/*.tar"):
        spec = {**work.assigned.spec, "data": {"uri": str(uri)}}
        work.assigned = work.assigned.model_copy(update={"spec": spec})
        assert run(work, settings, monkeypatch) is ExitCode.USER
        failure = work.finishes[-1].failure
        assert failure is not None
        assert failure.message.startswith("data.uri: ")
        assert ".tar" in failure.message


def test_run__a_stop_before_training_ends_as_stopped(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.stop_from_step = 0

    def wait_for_the_answer(*_: Any, reporter: Any, go_on: Any, **__: Any) -> None:
        reporter.post()
        go_on()

    monkeypatch.setattr(driver, "prepare", wait_for_the_answer)
    assert run(work, settings, monkeypatch) is ExitCode.DONE
    assert [(finish.outcome, finish.step) for finish in work.finishes] == [("stopped", 0)]


def test_run__leaves_no_handler_behind(
    work: FakeWork, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(logging.getLogger().handlers)
    run(work, settings, monkeypatch, ranks=Outcome(stopped=True, step=1))
    assert logging.getLogger().handlers == before


def test_connect__never_starts_a_cluster_of_its_own(settings: WorkerSettings) -> None:
    with pytest.raises(UsageError, match="RAY_ADDRESS"):
        driver.connect(settings)


@pytest.mark.parametrize("source", ["dall-e", "fake"])
def test_run__openais_tokenizer_is_fetched_before_the_ranks_start(
    settings: WorkerSettings, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    model = {
        "tokenizer": {"source": source},
        "enhancer": {"name": "vit_tiny_patch16_224"},
        "objective": {"name": "respix"},
    }
    training = {"steps": 4, "batch_size": 2}
    spec = {
        "kind": "pretrain",
        "name": "p",
        "data": {"uri": str(photos)},
        "model": model,
        "training": training,
    }
    address = StoreAddress(url=str(tmp_path / "store"))
    work = FakeWork(Assignment(job_id="ab", attempt=1, spec=spec, inputs={}, store=address))
    handed: list[Work] = []

    def train(work: Work, _: object) -> Outcome:
        handed.append(work)
        return Outcome(stopped=True, step=0)

    monkeypatch.setattr(driver, "WorkClient", lambda *_: work)
    monkeypatch.setattr(driver, "connect", lambda _: None)
    monkeypatch.setattr(driver, "_train", train)
    monkeypatch.setattr(OfficialTokenizer, "place", lambda self: f"place of {self.source.source}")
    assert driver.run(settings) is ExitCode.DONE
    assert [work.tokenizer for work in handed] == ["place of dall-e" if source == "dall-e" else None]
