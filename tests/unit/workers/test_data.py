import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cim_core.config import Duration, TrainingConfig
from cim_core.data.index import Entry, Index, NoUsableImageError
from cim_core.durations import plan
from cim_core.errors import DataError
from service.contracts.jobs import Progress
from service.contracts.work import Assignment, Report, StoreAddress
from tests.fakes.work_client import FakeWork
from workers.attempt import Attempt, Work, plan_document
from workers.data import REPORT, check_labels, data_report, digest, fingerprint, held_out, prepare
from workers.reporting import Reporter
from workers.settings import WorkerSettings
from workers.storage import JobStore

SPEC = {
    "kind": "tokenizer",
    "name": "t",
    "data": {"uri": "/nowhere"},
    "training": {"epochs": 2, "batch_size": 4},
    "plan": {"total_steps": 99},
}


def index(num: int, *, classes: tuple[str, ...] = (), root: str = "/data") -> Index:
    label = 0 if classes else None
    entries = tuple(Entry(f"a/{i}.png", None, 0, 100, 8, 8, label) for i in range(num))
    return Index(root=Path(root), entries=entries, skipped=(), classes=classes)


def attempt(tmp_path: Path, **changes: Any) -> Attempt:
    settings = WorkerSettings(
        url="http://x", job_id="ab12", attempt=1, code="c", cache_dir=tmp_path / "cache"
    )
    address = StoreAddress(url=str(tmp_path / "store"))
    spec = {**SPEC, **changes}
    return Attempt.of(settings, Assignment(job_id="ab12", attempt=1, spec=spec, inputs={}, store=address))


def prepared(tmp_path: Path, photos: Path) -> tuple[Any, FakeWork, JobStore]:
    work, this = FakeWork(), attempt(tmp_path, data={"uri": str(photos)})
    store, reporter = JobStore.of(this.assignment), Reporter(work)
    try:
        return prepare(this, store, reporter=reporter, go_on=lambda: None), work, store
    finally:
        reporter.post()


@pytest.mark.parametrize(("num", "out"), [(2, 1), (19, 1), (40, 2), (100, 5), (10_000, 256)])
def test_held_out__one_in_twenty_at_least_one_at_most_256(num: int, out: int) -> None:
    kept, away = held_out(index(num), seed=0)
    assert len(away) == out
    names = [entry.path for entry in (*kept.entries, *away.entries)]
    assert sorted(names) == sorted(entry.path for entry in index(num).entries)


def test_held_out__depends_on_the_seed_alone() -> None:
    first, again, other = (held_out(index(200), seed=seed)[1].entries for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_held_out__one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="one usable image is too few"):
        held_out(index(1), seed=0)


def test_prepare__plan_counts_what_is_trained_on(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(21):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no")
    work, service, store = prepared(tmp_path, photos)
    # 21 usable images, one held out, two epochs of 20 in batches of 4.
    assert work.plan.total_steps == 10
    # An epoch is 5 steps, a tenth of the training 1.
    assert service.reports[-1].plan == {
        "total_steps": 10, "warmup_steps": 0, "checkpoint_period": "5", "sample_period": "1",
        "batch_size": 4, "num_images": 20,
    }  # fmt: skip
    assert [entry.path for entry in service.reports[-1].files] == ["spec.json", REPORT]
    assert b"broken.png" in store.store.get_bytes(f"jobs/ab12/{REPORT}")


def test_plan_document__of_any_training_is_a_few_plain_values() -> None:
    """It is kept in the job's row: a list of the checkpoints of ten million steps took 26 MB there."""
    training = TrainingConfig(steps=10**12, batch_size=3, checkpoint_every=Duration(images=1000))
    text = Report(progress=Progress(), plan=plan_document(plan(training, num_images=10))).model_dump_json()
    assert '"checkpoint_period":"1000/3","sample_period":"100000000000"' in text
    assert len(text) < 1000


def test_attempt__drops_the_plan_that_an_earlier_release_listed(tmp_path: Path) -> None:
    listed = {"total_steps": 9, "checkpoint_steps": [3, 6, 9], "sample_steps": [0, 9], "batch_size": 4}
    assert not hasattr(attempt(tmp_path, plan=listed).spec, "plan")


def test_prepare__nothing_usable_still_leaves_the_report(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no")
    with pytest.raises(NoUsableImageError):
        prepared(tmp_path, photos)
    report = JobStore.of(attempt(tmp_path).assignment).store.get_bytes(f"jobs/ab12/{REPORT}")
    assert b"broken.png" in report


def test_data_report__several_sets_add_up() -> None:
    part = {"counted": 3, "used": 2, "skipped": [{"path": "x", "reason": "y"}]}
    report = data_report({"train": part, "val": part})
    assert (report["counted"], report["used"], len(report["skipped"])) == (6, 4, 2)
    assert set(report["sets"]) == {"train", "val"}


def test_check_labels__a_flat_folder_has_none() -> None:
    with pytest.raises(DataError, match=r"data\.val: labelled images must lie at CLASS/FILE"):
        check_labels({"train": index(3, classes=("a",)), "val": index(3)})


def test_check_labels__classes_must_agree() -> None:
    sets = {"probe_train": index(3, classes=("a", "b")), "probe_val": index(3, classes=("a", "c"))}
    with pytest.raises(DataError, match=r"probe\.train and probe\.val must hold the same classes.* b, c"):
        check_labels(sets)


def test_digest__moves_with_names_and_not_with_the_place() -> None:
    assert digest(index(3)) == digest(index(3, root="/elsewhere"))
    changed = dataclasses.replace(index(3).entries[0], size_bytes=101)
    other = dataclasses.replace(index(3), entries=(changed, *index(3).entries[1:]))
    assert digest(index(3)) != digest(other)


def test_fingerprint__holds_what_moves_a_weight_and_nothing_else(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / f"{number}.png")
    work, _, _ = prepared(tmp_path, photos)
    training = fingerprint(work)["training"]
    assert "learning_rate" in training
    assert not {"log_every", "checkpoint_every"} & set(training)


def test_fingerprint__another_official_tokenizer_is_another_run(tmp_path: Path) -> None:
    work = Work(attempt=attempt(tmp_path), indices={"data": index(3).to_json()}, plan=None)
    one, two = (fingerprint(dataclasses.replace(work, tokenizer=place)) for place in ("a", "b"))
    assert one != two
    assert fingerprint(work)["inputs"] == {}
