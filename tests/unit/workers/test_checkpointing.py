import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cim_core.engine.state import TrainState
from cim_core.errors import CheckpointMismatchError
from service.client.errors import StaleAttempt
from service.contracts.work import Assignment, StoreAddress
from service.store.base import CorruptObjectError
from tests.fakes.work_client import FakeWork
from workers.checkpointing import CheckpointWriter, fetch, restore
from workers.storage import JobStore

FINGERPRINT = {"model": {"depth": 2}}


def state(*, seed: int, step: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return TrainState(model=model, optimizer=optimizer, step=step)


@pytest.fixture
def work() -> FakeWork:
    return FakeWork()


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    address = StoreAddress(url=str(tmp_path / "store"))
    return JobStore.of(Assignment(job_id="ab12", attempt=2, spec={}, inputs={}, store=address))


@pytest.fixture
def writer(store: JobStore, work: FakeWork) -> CheckpointWriter:
    return CheckpointWriter(store, work, fingerprint=FINGERPRINT)


def test_save__files_are_below_the_attempt_and_all_in_the_manifest(
    writer: CheckpointWriter, work: FakeWork, store: JobStore
) -> None:
    writer.save(writer.snapshot(state(seed=0)), step=5, metrics={"loss": 1.0})
    (committed,) = work.checkpoints
    assert committed.prefix == "attempts/2/checkpoints/step-5"
    stored = {entry.key for entry in store.store.list("jobs/ab12")}
    assert stored == {f"jobs/ab12/{entry.path}" for entry in committed.files}
    manifest = json.loads(store.store.get_bytes(f"jobs/ab12/{committed.prefix}/manifest.json"))
    assert manifest["files"] == [entry.model_dump() for entry in committed.files[:-1]]


def test_save__a_stale_attempt_hears_it(writer: CheckpointWriter, work: FakeWork) -> None:
    work.stale = True
    with pytest.raises(StaleAttempt):
        writer.save(writer.snapshot(state(seed=0)), step=5, metrics={})


def test_save__deletes_nothing(writer: CheckpointWriter, work: FakeWork, store: JobStore) -> None:
    for step in (1, 2, 3, 4):
        writer.save(writer.snapshot(state(seed=0)), step=step, metrics={})
    stored = {entry.key for entry in store.store.list("jobs/ab12")}
    assert stored == {f"jobs/ab12/{entry.path}" for told in work.checkpoints for entry in told.files}
    assert len(work.checkpoints) == 4


def test_restore__brings_back_weights_moments_step_and_metrics(
    writer: CheckpointWriter, store: JobStore, tmp_path: Path
) -> None:
    saved, other = state(seed=0, step=5), state(seed=1)
    checkpoint = writer.save(writer.snapshot(saved), step=5, metrics={"loss": 1.25})
    metrics = restore(other, fetch(checkpoint, store, tmp_path / "cache"), fingerprint=FINGERPRINT)
    assert other.step == 5
    assert metrics == {"loss": 1.25}
    assert torch.equal(other.model.weight, saved.model.weight)  # type: ignore[arg-type]
    moments = [s.optimizer.state[s.model.weight]["exp_avg"] for s in (saved, other)]  # type: ignore[index]
    assert torch.equal(*moments)


def test_restore__another_configuration_is_refused(
    writer: CheckpointWriter, store: JobStore, tmp_path: Path
) -> None:
    checkpoint = writer.save(writer.snapshot(state(seed=0)), step=5, metrics={})
    folder = fetch(checkpoint, store, tmp_path / "cache")
    with pytest.raises(CheckpointMismatchError, match=r"model\.depth was 2, now 3"):
        restore(state(seed=0), folder, fingerprint={"model": {"depth": 3}})


def test_fetch__a_changed_byte_is_found(writer: CheckpointWriter, store: JobStore, tmp_path: Path) -> None:
    checkpoint = writer.save(writer.snapshot(state(seed=0)), step=5, metrics={})
    key = f"jobs/ab12/{checkpoint.prefix}/state.safetensors"
    data = bytearray(store.store.get_bytes(key))
    data[-1] ^= 1
    store.store.put_bytes(key, bytes(data))
    with pytest.raises(CorruptObjectError, match=r"state\.safetensors"):
        fetch(checkpoint, store, tmp_path / "cache")


def test_fetch__a_spoilt_download_is_replaced(
    writer: CheckpointWriter, store: JobStore, tmp_path: Path
) -> None:
    checkpoint = writer.save(writer.snapshot(state(seed=0)), step=5, metrics={})
    folder = fetch(checkpoint, store, tmp_path / "cache")
    good = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(b"half of it")
    fetch(checkpoint, store, tmp_path / "cache")
    assert (folder / "state.safetensors").read_bytes() == good
