"""The demo's specs are valid, take the user's pictures, and its service leaves nothing behind."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from rich.console import Console

from scripts import demo, demo_data, demo_service
from scripts.demo_service import DemoError
from service.client import Client
from service.contracts.jobs import FINAL, JobState, JobView
from service.contracts.parsing import parse_all

# A child that starts one of its own, tells its pid, and minds SIGTERM as argument 1 says.
FAMILY = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def end(number, frame):
    child.kill(); child.wait(); sys.exit(0)
signal.signal(signal.SIGTERM, end if sys.argv[1] == "polite" else signal.SIG_IGN)
print(child.pid, flush=True)
time.sleep(600)
"""


def folder_of(path: Path, *, num_files: int) -> Path:
    path.mkdir()
    for number in range(num_files):
        (path / f"{number}.jpg").write_bytes(b"x")
    return path


def test_demo__specs_are_valid_and_read_the_bundled_tiles() -> None:
    specs, notes = demo_data.load(None, num_cpus=2)
    assert [spec["kind"] for spec in specs] == ["tokenizer", "pretrain", "evaluate"]
    assert len(parse_all(specs)) == 3
    assert Path(specs[0]["data"]["uri"]).is_file()
    assert not notes


def test_demo__own_pictures_train_and_bundled_tiles_evaluate(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "own pictures", num_files=100)
    (tokenizer, pretrain, evaluate), notes = demo_data.load(data, num_cpus=1)
    assert tokenizer["data"]["uri"] == pretrain["data"]["uri"] == str(data)
    assert evaluate["data"]["train"].endswith("photos/train.tar")
    assert {spec["resources"]["cpus_per_worker"] for spec in (tokenizer, pretrain, evaluate)} == {1}
    assert any("evaluate keeps the bundled labelled tiles" in note for note in notes)


@pytest.mark.parametrize(("num_files", "batch_size"), [(64, 32), (63, 16), (5, 2), (1, 1)])
def test_demo__batch_fits_few_pictures(tmp_path: Path, num_files: int, batch_size: int) -> None:
    specs, _ = demo_data.load(folder_of(tmp_path / "few", num_files=num_files), num_cpus=2)
    assert [spec["training"]["batch_size"] for spec in specs[:2]] == [batch_size] * 2


def test_demo__counts_the_files_of_a_tar(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", num_files=3)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", arcname="a")
    assert demo_data.count_files(tmp_path / "a.tar") == 3


def test_demo__missing_data_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--data", str(tmp_path / "nowhere")]) == demo.USAGE
    assert "there is no such folder or file" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no tar at all"])
def test_demo__neither_folder_nor_tar_is_wrong_usage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DemoError, match=r"neither a folder nor|holds no file"):
        demo_data.load(tmp_path / "x", num_cpus=2)


def start_family(manners: str) -> tuple["subprocess.Popen[str]", int]:
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY, manners], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_stop__a_polite_service_ends_with_status_0() -> None:
    process, child = start_family("polite")
    assert demo_service.stop(process) == 0
    assert not psutil.pid_exists(child)


def test_stop__a_deaf_service_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_service, "STOP_S", 0.2)
    process, child = start_family("deaf")
    assert demo_service.stop(process) != 0
    assert process.poll() is not None
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_running__service_that_does_not_start_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "cim"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho port 8000 is in use >&2\nexit 2\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake.with_name("python")))
    with (
        pytest.raises(DemoError, match="did not start:\nport 8000 is in use"),
        demo_service.running(tmp_path / "data", environ=os.environ),
    ):
        pytest.fail("it must not come this far")


def test_running__sigterm_ends_the_service_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "cim"
    fake.parent.mkdir()
    ready = '{"api": "http://127.0.0.1:1", "mlflow": "", "data_dir": ""}'
    fake.write_text(f"#!/bin/sh\ntrap 'exit 0' TERM\necho '{ready}'\nwhile :; do sleep 0.1; done\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake.with_name("python")))
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt, match="SIGTERM"),
        demo_service.running(tmp_path / "data", environ=os.environ) as service,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert service.process.returncode == 0
    assert signal.getsignal(signal.SIGTERM) == before


class FewJobs:
    """As much of a client as `cancel_leftovers` needs."""

    def __init__(self, jobs: list[JobView]) -> None:
        self._jobs = jobs
        self.cancelled: list[str] = []

    def jobs(self) -> list[JobView]:
        return self._jobs

    def cancel(self, ref: str) -> None:
        self.cancelled.append(ref)


def job_in(state: JobState) -> JobView:
    fields: dict[str, Any] = {"desired": "run", "reason": "", "priority": 50, "labels": {}, "spec": {}}
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return JobView(
        id=f"job-{state}", name="x", kind="tokenizer", state=state, resolved={}, created_at=created, **fields
    )


def test_demo__unfinished_jobs_of_an_interrupted_demo_are_cancelled() -> None:
    client = FewJobs([job_in(state) for state in JobState])
    console = Console(file=io.StringIO())
    demo.cancel_leftovers(cast("Client", client), console=console)
    assert set(client.cancelled) == {f"job-{state}" for state in JobState if state not in FINAL}
