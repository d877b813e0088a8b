"""What `POST /v1/jobs/validate` says a job will take; the networks themselves are counted elsewhere."""

from typing import Any

import pytest

from cim_core.config import TokenizerConfig
from service.jobs.costs import NoCostError
from tests.fakes.costs import COST
from tests.fakes.world import Document, World

FILES = 10


@pytest.fixture
def world(world: World) -> World:
    """Ten files, a hidden one and a note, which only a worker can tell from a picture."""
    for number in range(FILES - 2):
        (world.images / f"{number}.png").write_bytes(b"not looked into")
    (world.images / ".hidden").write_bytes(b"")
    (world.images / "notes.txt").write_bytes(b"")
    return world


async def ask(world: World, *documents: Document) -> tuple[list[dict[str, Any]], list[str]]:
    """Estimates and warnings of specs that must be sound."""
    answer = await world.client.post("/v1/jobs/validate", json=list(documents))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told["estimate"], told["warnings"]


async def test_estimate__says_what_is_known(world: World) -> None:
    resources = {"workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 1}
    spec = world.tokenizer(resources=resources, training={"steps": 7, "batch_size": 8, "accumulation": 2})
    (estimate,), warnings = await ask(world, spec)
    assert estimate == {
        "name": "tok",
        "workers": 2,
        "cpus": 6,
        "gpus": 2,
        "steps": 7,
        "images": 56,
        "epochs": 5.6,
        "files": FILES,
        "depends_on": "",
        "images_per_pass": 2,
        "precision": "bf16",
        "cost": COST.model_dump(),
    }
    assert warnings == []


@pytest.mark.parametrize(
    ("length", "steps", "images"),
    [
        ({"epochs": 3}, 8, 32),  # 30 of 4 a step, rounded up
        ({"epochs": 0.5}, 2, 8),
        ({"images": 9}, 3, 12),
    ],
)
async def test_estimate__lengths_become_steps(
    world: World, length: dict[str, float], steps: int, images: int
) -> None:
    (estimate,), _ = await ask(world, world.tokenizer(training={**length, "batch_size": 4}))
    assert (estimate["steps"], estimate["images"]) == (steps, images)
    assert bool(estimate["depends_on"]) == ("epochs" in length)


async def test_estimate__epochs_of_images_elsewhere_stay_open(world: World) -> None:
    spec = world.tokenizer(data={"uri": "s3://bucket/images/"}, training={"epochs": 3, "batch_size": 4})
    (estimate,), _ = await ask(world, spec)
    assert (estimate["steps"], estimate["images"], estimate["files"]) == (None, None, None)
    assert estimate["epochs"] == 3
    assert "data.uri" in estimate["depends_on"]


async def test_estimate__a_batch_that_is_larger_than_the_data_is_warned_of(world: World) -> None:
    _, warnings = await ask(world, world.tokenizer(training={"steps": 1, "batch_size": FILES + 1}))
    assert len(warnings) == 1
    assert f"{FILES} files" in warnings[0]


async def test_estimate__counting_files_has_an_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.estimate._COUNT_LIMIT_S", -1.0)
    (estimate,), _ = await ask(world, world.tokenizer(training={"epochs": 3, "batch_size": 4}))
    assert (estimate["files"], estimate["steps"]) == (None, None)


async def test_estimate__an_evaluation_trains_nothing(world: World) -> None:
    estimates, _ = await ask(world, world.tokenizer(), world.pretrain(), world.evaluate())
    assert estimates[2]["cost"] is estimates[2]["steps"] is None
    assert len(world.costs.questions) == 2


@pytest.mark.parametrize(("resources", "precision"), [({}, "fp32"), ({"gpus_per_worker": 1}, "bf16")])
async def test_question__holds_what_the_cost_depends_on(
    world: World, resources: dict[str, int], precision: str
) -> None:
    spec = world.pretrain(source="fake", resources=resources, training={"epochs": 9, "batch_size": 4})
    await ask(world, spec, {**spec, "name": "other", "training": {"steps": 5, "batch_size": 4, "seed": 3}})
    first, second = world.costs.questions
    assert first == second
    assert first.training.precision == precision
    assert first.pretrain is not None
    assert (first.pretrain.enhancer.name, first.training.batch_size) == ("vit_tiny_patch16_224", 4)
    given = {**spec, "training": {"epochs": 9, "batch_size": 4, "precision": "bf16"}}
    await ask(world, given)
    assert world.costs.questions[2].training.precision == "bf16"
    assert {question.on_gpu for question in world.costs.questions} == {bool(resources)}


async def test_question__the_tokenizer_is_that_of_the_job_which_is_named(world: World) -> None:
    small, large = TokenizerConfig(vocab_size=64), TokenizerConfig(vocab_size=128)
    await world.submit(world.tokenizer(model={"vocab_size": 64}))
    beside = world.tokenizer("new", model={"vocab_size": 128})
    await ask(world, world.pretrain(), beside, world.pretrain("enc2", source="job:new"))
    assert [question.tokenizer for question in world.costs.questions] == [small, large, large]
    assert [question.pretrain is None for question in world.costs.questions] == [False, True, False]


async def test_question__a_tokenizer_at_an_address_is_not_looked_into(world: World) -> None:
    _, warnings = await ask(world, world.pretrain(source="s3://bucket/tokenizer/"))
    assert world.costs.questions[0].tokenizer is None
    assert len(warnings) == 1
    assert "s3://bucket/tokenizer/" in warnings[0]


async def test_question__of_a_peer_knows_no_tokenizer(world: World) -> None:
    model = {"method": "mae", "enhancer": {"name": "vit_tiny_patch16_224"}}
    (job,) = await world.submit(world.pretrain(model=model))
    assert "tokenizer" not in job["resolved"]["model"]
    _, warnings = await ask(world, world.pretrain(model=model))
    (question,) = world.costs.questions
    assert question.pretrain is not None
    assert (question.pretrain.method, question.tokenizer) == ("mae", None)
    assert not [warning for warning in warnings if "tokenizer" in warning]


async def test_cost__that_is_not_to_be_had_is_a_warning(world: World) -> None:
    world.costs.answer = NoCostError("torch is not installed")
    (estimate,), warnings = await ask(world, world.tokenizer())
    assert (estimate["cost"], estimate["steps"]) == (None, 10)
    assert warnings == ["tok: no parameters, MACs and memory: torch is not installed"]
