"""The parts of a pre-training around the training itself."""

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cim_core.config import Duration
from cim_core.data.index import Entry, Index
from cim_core.durations import Plan
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer
from cim_core.tokenizers.fake import FakeTokenizer
from cim_core.tokenizers.store import save_tokenizer
from service.client.work import WorkClient
from service.contracts.specs import Probe
from service.contracts.work import Assignment, StoreAddress
from service.store.directory import DirectoryStore
from tests.fakes.work_client import FakeWork
from workers.attempt import Attempt, Outcome, Work
from workers.pretrain_job import card_of, probe_steps, spec_of, tokenizer_of
from workers.rank import Rank
from workers.reporting import Reporter
from workers.settings import WorkerSettings
from workers.storage import JobStore

PLAN = Plan(
    total_steps=4,
    warmup_steps=1,
    checkpoint_steps=frozenset({4}),
    sample_steps=frozenset({4}),
    batch_size=2,
    num_images=2,
)
ORIGIN = {"encoder_sha256": "e" * 64, "decoder_sha256": "d" * 64}


def rank_of(tmp_path: Path, *, source: str, tokenizer: str | None = None) -> Rank:
    model = {
        "tokenizer": {"source": source},
        "enhancer": {"name": "vit_tiny_patch16_224"},
        "objective": {"name": "respix"},
    }
    spec: dict[str, Any] = {"kind": "pretrain", "name": "p", "data": {"uri": "/x"}, "model": model}
    spec |= {"training": {"steps": 4, "batch_size": 2}}
    address = StoreAddress(url=str(tmp_path / "store"))
    assignment = Assignment(job_id="ab", attempt=1, spec=spec, inputs={"tokenizer": source}, store=address)
    settings = WorkerSettings(url="http://x", job_id="ab", attempt=1, code="c", cache_dir=tmp_path / "cache")
    index = Index(
        root=Path("/x"), entries=(Entry("a.png", None, 0, 9, 8, 8, None),) * 2, skipped=(), classes=()
    )
    work, service = Attempt.of(settings, assignment), FakeWork()
    return Rank(
        work=Work(attempt=work, indices={"data": index.to_json()}, plan=PLAN, tokenizer=tokenizer),
        number=0,
        world_size=1,
        device=torch.device("cpu"),
        store=JobStore.of(assignment),
        service=cast(WorkClient, service),
        reporter=Reporter(service),
        files=[],
    )


@pytest.mark.parametrize(
    ("every", "steps"),
    [({"images": 5}, {3, 4}), ({"steps": 2}, {2, 4}), ({"epochs": 0.1}, {1, 2, 3, 4}), ({"epochs": 9}, {4})],
)
def test_probe_steps__are_multiples_of_whole_steps_and_the_end(
    tmp_path: Path, every: dict[str, float], steps: set[int]
) -> None:
    spec = spec_of(rank_of(tmp_path, source="fake"))
    probing = spec.model_copy(update={"probe": Probe(train="/a", val="/b", every=Duration(**every))})  # type: ignore[arg-type]
    assert {step for step in range(10) if step in probe_steps(probing, PLAN)} == steps
    assert [step for step in range(10) if step in probe_steps(spec, PLAN)] == []


def official(folder: Path) -> DalleTokenizer:
    model = DalleTokenizer(DalleConfig(width=4, blocks_per_group=1, vocab_size=8, code_dim=4), origin=ORIGIN)
    for parameter in model.parameters():
        parameter.fill_(0.1)
    save_tokenizer(model, folder)
    return model


def test_tokenizer__of_openai_is_where_the_driver_put_it(tmp_path: Path) -> None:
    official(tmp_path / "made")
    DirectoryStore(tmp_path / "store").put_folder("tokenizers/dall-e/x", tmp_path / "made")
    tokenizer = tokenizer_of(rank_of(tmp_path, source="dall-e", tokenizer="tokenizers/dall-e/x"))
    assert isinstance(tokenizer, DalleTokenizer)
    assert tokenizer.origin == ORIGIN


def test_tokenizer__a_folder_that_was_converted_before_serves_as_well(tmp_path: Path) -> None:
    official(tmp_path / "made")
    tokenizer = tokenizer_of(rank_of(tmp_path, source=str(tmp_path / "made")))
    assert tokenizer is not None
    assert tokenizer.vocab_size == 8


def test_tokenizer__a_fake_one_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(tokenizer_of(rank_of(tmp_path, source="fake")), FakeTokenizer)
    assert "FAKE" in caplog.text


def test_card__names_openais_files_by_their_checksums(tmp_path: Path) -> None:
    rank = rank_of(tmp_path, source="dall-e")
    card = card_of(rank, official(tmp_path / "made"), Outcome(stopped=False, step=4))
    assert {key: card[key] for key in ("tokenizer_encoder_sha256", "tokenizer_decoder_sha256")} == {
        f"tokenizer_{name}": digest for name, digest in ORIGIN.items()
    }
    assert card["steps"] == 4
    assert not [
        key for key in card_of(rank, FakeTokenizer(), Outcome(stopped=False, step=4)) if "sha256" in key
    ]
