"""File names that are not UTF-8: Linux allows any bytes, and archives of other systems bring them."""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel

from cim_core.data.index import Index
from service.contracts.jobs import FailureKind, LogLine, Progress
from service.contracts.work import Assignment, Failure, Finish, Report, StoreAddress
from tests.fakes.work_client import FakeWork, serving
from workers import driver
from workers.attempt import Outcome, Work
from workers.failures import ExitCode, classify, portable
from workers.logs import BlottingFormatter
from workers.reporting import Reporter
from workers.settings import WorkerSettings

CAFE = os.fsdecode(b"caf\xe9")
SHOWN = "caf\\udce9"
IN_JSON = json.dumps(SHOWN).strip('"')
CODE = "code-of-the-test"
MODELS: list[Callable[[], BaseModel]] = [
    lambda: Progress(message=CAFE),
    lambda: Report(progress=Progress(message=CAFE)),
    lambda: Failure(kind=FailureKind.USER, message=CAFE),
    lambda: Finish(outcome="succeeded", step=1, warnings=[CAFE]),
    lambda: LogLine(at=datetime.now(UTC), attempt=1, source="driver", level="info", message=CAFE),
]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


def folder_of(files: dict[bytes, bytes], root: Path) -> Path:
    for name, data in files.items():
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return root


def tar_of(files: dict[bytes, bytes], root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "photos.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return root / "photos.tar"


def run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ExitCode, FakeWork]:
    """An attempt over real HTTP, as far as it comes without Ray; a rank reads every picture and names it."""

    def train(work: Work, _: object) -> Outcome:
        index = Index.from_json(work.indices["data"])
        names = [entry.name for entry in index.entries if index.read(index.entries.index(entry)) == png()]
        logging.getLogger("workers.rank").info("trained on %s", names[-1])
        return Outcome(stopped=False, step=2, total_steps=2, warnings=names)

    # Not to be captured: pytest-xdist dies of such names in a report.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(driver, "connect", lambda _: None)
    monkeypatch.setattr(driver, "_train", train)
    training = {"steps": 2, "batch_size": 1}
    spec: dict[str, Any] = {"kind": "pretrain", "name": "odd", "data": {"uri": str(images)}}
    spec |= {"model": {"method": "mae", "enhancer": {"name": "vit_tiny_patch16_224"}}, "training": training}
    store = StoreAddress(url=str(tmp_path / "store"))
    work = FakeWork(Assignment(job_id="ab", attempt=1, spec=spec, inputs={}, store=store))
    with serving(work, code=CODE) as url:
        settings = WorkerSettings(url=url, job_id="ab", attempt=1, code=CODE, cache_dir=tmp_path / "cache")
        return driver.run(settings), work


def stored(tmp_path: Path, path: str) -> str:
    """Text of a file of the job; every piece of it where `path` is a folder."""
    place = tmp_path / "store/jobs/ab" / path
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return "".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("make", MODELS)
def test_wire_model__carries_a_name_that_is_not_utf8(make: Callable[[], BaseModel]) -> None:
    assert IN_JSON in make().model_dump_json()


@pytest.mark.parametrize("make", [folder_of, tar_of])
def test_run__trains_on_names_that_are_not_utf8_and_reports_the_unusable_ones(
    make: Callable[[dict[bytes, bytes], Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {b"a.png": png(), b"caf\xe9/caf\xe9.png": png(), b"caf\xe9/notes.txt": b"no picture"}
    code, work = run(make(files, tmp_path / "photos"), tmp_path, monkeypatch)
    assert code is ExitCode.DONE
    (finish,) = work.finishes
    assert finish.warnings[-1].endswith(f"{SHOWN}/{SHOWN}.png")
    report = json.loads(stored(tmp_path, "data/report.json"))
    (skipped,) = report["skipped"]
    assert skipped["path"].endswith(f"{SHOWN}/notes.txt")
    assert f"{IN_JSON}/{IN_JSON}.png" in stored(tmp_path, "logs/attempt-1")


@pytest.mark.parametrize("make", [folder_of, tar_of])
def test_run__without_a_usable_file_fails_once_as_the_users_and_names_one(
    make: Callable[[dict[bytes, bytes], Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, work = run(make({b"caf\xe9/notes.txt": b"no"}, tmp_path / "photos"), tmp_path, monkeypatch)
    assert code is ExitCode.USER
    (finish,) = work.finishes
    assert finish.failure is not None
    assert finish.failure.kind is FailureKind.USER
    assert f"{SHOWN}/notes.txt" in finish.failure.message
    assert SHOWN in json.loads(stored(tmp_path, "data/report.json"))["skipped"][0]["path"]


def test_run__a_folder_in_such_a_folder_as_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder_of({b"caf\xe9/a.png": png(), b"b/b.png": png()}, tmp_path / "photos")
    assert run(images, tmp_path, monkeypatch)[0] is ExitCode.DONE


def test_say__a_message_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    work = FakeWork()
    reporter = Reporter(work)
    reporter.say(f"reading {CAFE}")
    reporter.post()
    assert work.reports[-1].model_dump(mode="json")["progress"]["message"] == f"reading {SHOWN}"
    assert IN_JSON in work.reports[-1].model_dump_json()


def test_classify__a_long_message_of_such_names_is_cut_to_what_the_service_takes() -> None:
    failure = classify(ValueError(CAFE * 3000), store_url="/store")
    assert SHOWN in failure.message
    assert len(failure.message) <= 4000
    assert SHOWN in str(portable(ValueError(CAFE), store_url="/store", step=1))


def test_formatter__prints_what_any_terminal_takes() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "read %s", (f"{CAFE}\0",), None)
    assert BlottingFormatter("%(message)s", secrets=[]).format(record) == f"read {SHOWN}\ufffd"
