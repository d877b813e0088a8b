"""Worker processes on a real local Ray, from the assignment to the finish. The service is a stand-in.

Starting a Ray Train run costs tens of seconds on two cores, so each test here proves several things.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from service.contracts.jobs import FailureKind
from service.contracts.work import Assignment, Checkpoint, StoreAddress
from service.store.base import sha256_of
from tests.fakes.work_client import FakeWork, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CODE = "claim-code-of-the-test"
VIT = {
    "name": "vit_tiny_patch16_224",
    "shared_blocks": 1,
    "options": {"depth": 2, "embed_dim": 64, "num_heads": 2},
}


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local Ray of two CPUs, ended with the module."""
    # Ray reads these in the processes that it starts, so a test's own patching would be too late.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = start_ray()
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def start_ray(*, tries: int = 3) -> Any:
    """Ray gives a node 30 seconds to come up, which a busy machine may miss."""
    for left in reversed(range(tries)):
        try:
            return ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False
            )
        except Exception:
            ray.shutdown()
            if not left:
                raise
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two easily told classes of 24 pictures each, at CLASS/FILE, and one file that is no picture.

    The names of a picture and of that file are not UTF-8.
    """
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (folder / label).mkdir()
        for number in range(24):
            pixels = np.clip(np.array(colour) + noise.normal(0, 25, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    (folder / "red" / os.fsdecode(b"br\xf6ken.png")).write_bytes(b"not a picture")
    (folder / "red" / "0.png").rename(folder / "red" / os.fsdecode(b"caf\xe9.png"))
    return folder


def spec_of(kind: str, photos: Path, **changes: Any) -> dict[str, Any]:
    uri = str(photos)
    base: dict[str, Any] = {"name": f"a-{kind}", "kind": kind}
    model: dict[str, Any]
    training = {"steps": 6, "batch_size": 8, "warmup": {"steps": 1}, "log_every": 2, "learning_rate": 1e-3}
    training |= {"checkpoint_every": {"steps": 3}, "sample_every": {"steps": 6}, "precision": "fp32"}
    match kind:
        case "tokenizer":
            model = {"image_size": 16, "stride": 4, "width": 8, "vocab_size": 16, "code_dim": 8}
            return base | {"data": {"uri": uri}, "model": model, "training": training | changes}
        case "pretrain":
            model = {"image_size": 32, "patch_size": 8, "enhancer": VIT, "objective": {"name": "revdet"}}
            model |= {"tokenizer": {"source": "fake"}, "generator": {"depth": 2}}
            return base | {"data": {"uri": uri}, "model": model, "training": training | changes}
        case _:
            data = {"train": uri, "val": uri}
            return base | {"encoder": "job:x", "data": data, "tasks": [{"name": "knn", "k": 5}]}


class Bench:
    """One job in a directory store, and worker processes for its attempts."""

    def __init__(self, root: Path, spec: dict[str, Any], *, ray_address: str, job_id: str) -> None:
        self.root, self.spec, self.ray_address, self.job_id = root, spec, ray_address, job_id

    @contextmanager
    def attempt(
        self, number: int = 1, *, inputs: dict[str, str] | None = None, checkpoint: Checkpoint | None = None
    ) -> Iterator[tuple[FakeWork, "subprocess.Popen[bytes]"]]:
        """A running worker and the service's view of it; the process is gone afterwards."""
        work = FakeWork(
            Assignment(
                job_id=self.job_id,
                attempt=number,
                spec=self.spec,
                submitted=self.spec,
                inputs=inputs or {},
                store=StoreAddress(url=str(self.root)),
                checkpoint=checkpoint,
                report_every_s=0.2,
            )
        )
        with serving(work, code=CODE) as url:
            env = {**os.environ, "CIM_CLAIM_CODE": CODE, "RAY_ADDRESS": self.ray_address}
            command = [sys.executable, "-m", "workers", "--url", url, "--attempt", f"{self.job_id}/{number}"]
            process = subprocess.Popen(command, env={**env, "OMP_NUM_THREADS": "1"})
            try:
                yield work, process
            finally:
                process.kill()
                process.wait()

    def file(self, path: str) -> Path:
        return self.root / "jobs" / self.job_id / path

    def json(self, path: str) -> Any:
        return json.loads(self.file(path).read_text())

    def log(self, attempt: int = 1) -> str:
        chunks = sorted(self.file(f"logs/attempt-{attempt}").glob("*.jsonl"))
        return "".join(chunk.read_text() for chunk in chunks)


def check_manifest(bench: Bench, work: FakeWork) -> set[str]:
    """Every file of the finish is in the store as its line says; the paths."""
    (finish,) = work.finishes
    for entry in finish.files:
        assert bench.file(entry.path).stat().st_size == entry.size
        assert sha256_of(bench.file(entry.path)) == entry.sha256
    return {entry.path for entry in finish.files}


def test_tokenizer__leaves_files_metrics_and_a_report(ray_address: str, photos: Path, tmp_path: Path) -> None:
    tokenizer = Bench(tmp_path, spec_of("tokenizer", photos), ray_address=ray_address, job_id="a" * 16)
    with tokenizer.attempt() as (work, process):
        assert process.wait(timeout=500) == 0, tokenizer.log()
    assert {"tokenizer/model.safetensors", "tokenizer/config.json", "result.json"} <= check_manifest(
        tokenizer, work
    )
    metrics = work.finishes[0].metrics
    # 48 usable images: 2 are held out, and every step but the first and the odd ones is reported.
    assert work.reports[-1].progress.epoch == pytest.approx(6 * 8 / 46)
    assert sorted(work.metric("loss")) == [1, 2, 4, 6]
    assert 0 < metrics["val_psnr"] < 60
    assert 1 <= metrics["val_perplexity"] <= 16
    assert tokenizer.json("result.json").get("warnings", []) == work.finishes[0].warnings
    report = tokenizer.json("data/report.json")
    assert (report["counted"], report["used"]) == (49, 48)
    assert [line["path"] for line in report["skipped"]] == [r"red/br\udcf6ken.png"]
    assert tokenizer.json("spec.json")["libraries"]["ray"] == ray.__version__
    assert {"driver", "rank-0"} <= {json.loads(line)["source"] for line in tokenizer.log().splitlines()}
    assert len(work.tokens) == 1, "driver and ranks share one token"
    for secret in (CODE, *work.tokens):
        assert secret not in tokenizer.log()


def test_killed_worker__is_infrastructure_and_the_next_attempt_resumes_from_the_last_checkpoint(
    ray_address: str, photos: Path, tmp_path: Path
) -> None:
    spec = spec_of("pretrain", photos, steps=400, checkpoint_every={"steps": 20}, sample_every={"steps": 400})
    spec["resources"] = {"workers": 2}
    bench = Bench(tmp_path, spec, ray_address=ray_address, job_id="d" * 16)
    with bench.attempt() as (work, process):
        work.wait_for_checkpoint(timeout_s=500)
        rank_processes()[-1].kill()
        assert process.wait(timeout=500) == 11, bench.log()
    (finish,) = work.finishes
    assert finish.outcome == "failed"
    assert finish.failure is not None
    assert finish.failure.kind is FailureKind.INFRASTRUCTURE
    assert not bench.file("encoder").exists()

    last = work.checkpoints[-1]
    with bench.attempt(2, checkpoint=last) as (again, process):
        first = again.wait_for_checkpoint(timeout_s=500)
        again.stop_from_step = 0
        assert process.wait(timeout=500) == 0, bench.log(2)
    assert first.step == last.step + 20
    assert min(again.metric("loss")) == last.step + 2
    # The stop keeps what was done: a checkpoint at the step where it ended.
    (finish,) = again.finishes
    assert finish.outcome == "stopped"
    assert again.checkpoints[-1].step == finish.step
    assert finish.step < 400
    assert bench.file(f"{again.checkpoints[-1].prefix}/manifest.json").exists()


def rank_processes() -> list[psutil.Process]:
    """Ray Train's workers of this test's Ray alone, oldest first. Ray names them after the class."""
    found = [
        p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    return sorted(found, key=lambda process: process.create_time())


def test_user_errors__end_the_attempt_with_a_sentence(ray_address: str, photos: Path, tmp_path: Path) -> None:
    spec = spec_of("pretrain", photos, batch_size=64)
    bench = Bench(tmp_path, spec, ray_address=ray_address, job_id="e" * 16)
    with bench.attempt() as (work, process):
        assert process.wait(timeout=500) == 10, bench.log()
    (finish,) = work.finishes
    assert finish.failure is not None
    assert finish.failure.kind is FailureKind.USER
    assert "training.batch_size" in finish.failure.message
    assert "Traceback" not in finish.failure.message
    assert "Traceback" in bench.log()


def test_stale_attempt__ends_without_finish_or_checkpoint(
    ray_address: str, photos: Path, tmp_path: Path
) -> None:
    spec = spec_of("pretrain", photos, steps=4000, checkpoint_every={"steps": 4000})
    bench = Bench(tmp_path, spec, ray_address=ray_address, job_id="f" * 16)
    with bench.attempt() as (work, process):
        deadline = time.monotonic() + 500
        while not work.metric("loss") and time.monotonic() < deadline:
            time.sleep(0.2)
        work.stale = True
        assert process.wait(timeout=500) == 14, bench.log()
    assert work.finishes == []
    assert not list(bench.file("attempts/1").glob("checkpoints/*"))
