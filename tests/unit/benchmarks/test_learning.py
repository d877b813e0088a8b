"""The comparison of methods: seconds become steps, runs survive a cut, means and spreads are right."""

import functools
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.changes import changed
from benchmarks.labelled import decoded
from benchmarks.learning import budget, finetuning, runs, setup
from benchmarks.learning.budget import Course, num_steps
from benchmarks.learning.cases import CASES, VIT, model_config, task_of
from benchmarks.learning.finetuning import Classifier, ClassifyTask, Length, finetuned
from benchmarks.learning.probing import (
    DecodedMap,
    MeanOverPositions,
    Pixels,
    StageMap,
    TokenizerMap,
    inner_stages,
    recalibrated,
)
from benchmarks.learning.report import SETTING
from benchmarks.records import append, read
from cim_core.config import TokenizerConfig, TrainingConfig
from cim_core.data.dataset import PILLOW_PIXEL_BYTES, ImageDataset, ViewConfig, collate
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.data.sampler import SampleId
from cim_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cim_core.engine.callbacks import StepReport
from cim_core.evaluation.features import extract, normalise
from cim_core.methods import build_model
from cim_core.models.enhancer import Enhancer
from cim_core.tokenizers.dvae import DiscreteVAE
from tests.unit.cim_core.cim_models import model_config as small_config
from tests.unit.cim_core.cim_models import tiny_cim
from tests.unit.cim_core.tiny import CPU, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = write_images(tmp_path_factory.mktemp("images"), count=12, side=40)
    return ImageDataset(scan(folder), ViewConfig(image_size=32, token_size=16, crop_min=0.3))


def small_tokenizer() -> DiscreteVAE:
    config = TokenizerConfig(image_size=16, stride=4, width=4, vocab_size=8, code_dim=4)
    return DiscreteVAE(config, generator=torch.Generator().manual_seed(0))


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "step", "steps"), [(200, 0.5, 400), (10, 3.0, 3), (1, 5.0, 1)])
def test_budget__whole_steps_that_fit_and_at_least_one(seconds: float, step: float, steps: int) -> None:
    assert num_steps(seconds, step) == steps


def test_course__looks_cost_no_training_time() -> None:
    clock = Clock()

    def look() -> dict[str, float]:
        clock.now += 1000  # a slow probe
        return {"knn": 0.5}

    course = Course(total_steps=10, look=look, clock=clock)
    course.on_start(0)
    course.on_sample(0)
    clock.now += 7
    course.on_sample(5)
    clock.now += 2
    assert [point["seconds"] for point in course.curve] == [0, 7]
    assert [point["step"] for point in course.curve] == [0, 5]
    assert course.seconds() == 9


def test_course__metrics_are_means_of_the_last_tenth() -> None:
    course = Course(total_steps=20, look=dict)
    for step, loss in ((2, 100.0), (18, 50.0), (19, 1.0), (20, 2.0)):
        course.on_step(StepReport(step=step, metrics={"loss": loss}, images_per_s=1, learning_rate=0))
    assert course.metrics() == {"loss": 1.5}
    assert Course(total_steps=1, look=dict).metrics() == {}


def test_pilot__is_the_median_of_the_steps_behind_the_warm_ones(
    images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    took = itertools.chain([50.0] * budget.WARM_STEPS, itertools.cycle([1.0, 2.0, 30.0]))

    def step(*_: Any, **__: Any) -> None:
        clock.now += next(took)

    monkeypatch.setattr(budget, "train_step", step)
    model = tiny_cim()
    training = TrainingConfig(steps=1, batch_size=4, precision="fp32")
    task = task_of(CASES["cim-respix"], model, seed=0)
    assert budget.step_seconds(model, task, images, training, device=CPU, clock=clock) == 2.0


def test_pictures__are_decoded_before_any_clock_starts(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=3, side=40)
    pictures = setup._pictures(scan(folder))
    shutil.rmtree(folder)
    assert [pictures.picture(place).size for place in range(3)] == [(40, 40)] * 3


def test_pictures__that_find_no_room_are_left_to_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def decode(_: ImageDataset, place: int) -> Image.Image:
        asked.append(place)
        return Image.new("RGB", (40, 40))

    monkeypatch.setattr(ImageDataset, "_decoded", decode)
    index = scan(write_images(tmp_path / "images", count=9, side=40))
    decoded(ImageDataset(index, ViewConfig(image_size=1), cache_bytes=3 * 40 * 40 * PILLOW_PIXEL_BYTES))
    assert asked == [0, 1, 2, 3, 3]


def test_processor_clock__is_the_process_s_own_time_for_each_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 12.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert budget.CLOCKS["processor"]() == 3.0


def test_train__makes_the_steps_and_the_looks(images: ImageDataset) -> None:
    model = tiny_cim()
    training = TrainingConfig(steps=7, batch_size=4, precision="fp32")
    seen: list[bool] = []
    course = budget.train(
        model,
        task_of(CASES["cim-respix"], model, seed=0),
        images,
        training,
        look=lambda: seen.append(model.training) or {"knn": 0.25},  # type: ignore[func-returns-value]
        points=3,
        device=CPU,
    )
    assert [point["step"] for point in course.curve] == [0, 3, 6, 7]
    assert len(seen) == 4
    assert {"loss", "mim_accuracy"} <= set(course.metrics())


def test_changes__reach_both_parts_of_a_configuration() -> None:
    both = runs.Both(model=small_config(), training=TrainingConfig(steps=1))
    new = changed(both, {"model.objective.weight": 3.0, "training.learning_rate": 0.5})
    assert (new.model.objective.weight, new.training.learning_rate) == (3.0, 0.5)
    assert both.training.learning_rate != 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=10", ("a.b", 10)),
        ("a=null", ("a", None)),
        ("a=window", ("a", "window")),
        ("a=1e-3", ("a", 0.001)),
    ],
)
def test_set__values_are_json_or_text(text: str, expected: tuple[str, Any]) -> None:
    assert setup.change(text) == expected


def test_cases__all_vits_begin_with_the_weights_of_random() -> None:
    tokenizer = small_tokenizer()
    weights = {}
    for name, case in CASES.items():
        if case.enhancer is VIT:
            config = model_config(case, image_size=32, patch_size=8)
            model = build_model(config, tokenizer if case.needs_tokenizer else None, seed=3)
            weights[name] = model.enhancer.state_dict()
    assert len(weights) == 9
    expected = weights["random"]
    for state in weights.values():
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "side"), [(64, 8, 8), (64, 16, 4), (64, 4, 8), (96, 48, 3)]
)
def test_cases__map_of_a_cnn_is_as_fine_as_its_tokens_or_as_timm_can(
    image_size: int, patch_size: int, side: int
) -> None:
    for name, case in CASES.items():
        if case.enhancer is not VIT:
            config = model_config(case, image_size=image_size, patch_size=patch_size)
            enhancer = Enhancer(config.enhancer, image_size=image_size, patch_size=patch_size)
            assert enhancer.side == side, name


def test_cases__only_methods_without_tokenizer_are_given_its_seconds() -> None:
    longer = {name for name, case in CASES.items() if case.adds_tokenizer_seconds}
    assert longer == {"simmim-long", "mae-long"}
    assert not any(CASES[name].needs_tokenizer for name in longer)


def test_generator_alone__teaches_shared_layers_only(images: ImageDataset) -> None:
    case = CASES["generator-only"]
    model = tiny_cim(small_config(shared_blocks=1))
    batch = collate([images[SampleId(0, place)] for place in range(3)])
    output = task_of(case, model, seed=0).losses(batch, step=0, micro=0, rank=0, progress=0)
    output.loss.backward()  # type: ignore[no-untyped-call]
    learns = {name for name, p in model.enhancer.backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] + name.split(".")[1] for name in learns} == {"blocks0", "patch_embedproj"}
    assert output.loss == output.metrics["mim_loss"]


def test_pixels__are_the_pictures_flat(images: ImageDataset) -> None:
    small = ImageDataset(images.index, ViewConfig(image_size=4))
    features, _ = extract(Pixels(), small, batch_size=5, device=CPU)
    expected = torch.stack([normalise(small.eval_image(place)).flatten() for place in range(len(small))])
    assert torch.equal(features, expected)


def test_tokenizer_features__are_of_the_picture_as_the_tokenizer_sees_it(images: ImageDataset) -> None:
    tokenizer = small_tokenizer()
    small = ImageDataset(images.index, ViewConfig(image_size=16))
    features, _ = extract(MeanOverPositions(TokenizerMap(tokenizer)), small, batch_size=5, device=CPU)
    pixels = torch.stack([small.eval_image(place) for place in range(len(small))]).float() / 255
    maps = tokenizer.encoder.blocks[:-1](0.8 * pixels + 0.1)
    torch.testing.assert_close(features, maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert features.shape == (12, 4 * 2**2)  # the last group of three is four times as wide


class Negative(nn.Module):
    """A tokenizer that loses nothing, so that each step before and behind it counts."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return 1 - tokens


def test_decoded_map__is_of_the_picture_that_the_decoder_paints() -> None:
    tokenizer: Any = Negative()
    enhancer = tiny_cim().enhancer.eval()
    noise = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = ((noise > 0.5) * 255).to(torch.uint8)  # sharp edges: bicubic leaves [0, 1]
    resize = functools.partial(nn.functional.interpolate, mode="bicubic")
    with torch.no_grad():
        small = resize(pixels.float() / 255, size=16, antialias=True).clamp(0, 1)
        painted = resize(tokenizer.decode(tokenizer.encode(small)), size=32).clamp(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        expected = enhancer((painted - mean) / std)
        found = DecodedMap(enhancer, tokenizer, token_size=16)(normalise(pixels))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_stage_maps__are_those_of_the_stages_before_the_last(images: ImageDataset) -> None:
    enhancer = tiny_cim(small_config(name="test_resnet")).enhancer.eval()
    batch = normalise(torch.stack([images.eval_image(place) for place in range(3)]))
    outputs: list[torch.Tensor] = []
    for name in ("layer2", "layer3"):
        enhancer.backbone.get_submodule(name).register_forward_hook(lambda *given: outputs.append(given[2]))
    with torch.no_grad():
        enhancer(batch)
        expected = list(outputs)
        found = [StageMap(enhancer, stage)(batch) for stage in inner_stages(enhancer)]
    assert len(found) == len(expected) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recalibrated__batch_norm_has_the_statistics_of_real_images(images: ImageDataset) -> None:
    enhancer = tiny_cim(small_config(name="test_resnet")).enhancer.eval()
    first = next(layer for layer in enhancer.modules() if isinstance(layer, nn.BatchNorm2d))
    before = {name: x.clone() for name, x in enhancer.state_dict().items()}
    assert first.running_mean is not None
    untouched = first.running_mean.clone()
    again = recalibrated(enhancer, images, device=CPU)
    assert all(torch.equal(x, before[name]) for name, x in enhancer.state_dict().items())
    new = next(layer for layer in again.modules() if isinstance(layer, nn.BatchNorm2d))

    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for views in ImageLoader(images, batch_size=12).steps(0, 20):
        enhancer(normalise(views.pixels_B3HW))
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen])
    assert new.running_mean is not None
    torch.testing.assert_close(new.running_mean, means.mean(dim=0), rtol=1e-3, atol=1e-4)
    assert not torch.equal(new.running_mean, untouched)


def test_finetuning__labels_are_those_of_the_batch_and_the_encoder_is_a_copy(images: ImageDataset) -> None:
    enhancer = tiny_cim().enhancer
    model = Classifier(enhancer, 2)
    nn.init.normal_(model.head.weight)
    batch = collate([images[SampleId(0, place)] for place in (3, 11, 0)])
    output = ClassifyTask(model, images).losses(batch, step=0, micro=0, rank=0, progress=0)
    labels = torch.tensor([images.label(place) for place in (3, 11, 0)])
    expected = nn.functional.cross_entropy(model(batch.pixels_B3HW), labels)
    assert output.loss.item() == pytest.approx(expected.item())
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in enhancer.parameters())
    assert model.enhancer.backbone.patch_embed.proj.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("length", "steps", "pilots"),
    [(Length(60), 4, 1), (Length(60, steps=3), 3, 0), (Length(0, steps=2), 2, 0)],
)
def test_finetuning__is_as_long_as_the_steps_say_or_else_the_seconds(
    images: ImageDataset, monkeypatch: pytest.MonkeyPatch, *, length: Length, steps: int, pilots: int
) -> None:
    counted = {"pilot": 0, "step": 0}
    losses = ClassifyTask.losses

    def pilot(*_: Any, **__: Any) -> float:
        counted["pilot"] += 1
        return 15.0

    def step(*given: Any, **at: Any) -> Any:
        counted["step"] += 1
        return losses(*given, **at)

    monkeypatch.setattr(finetuning, "step_seconds", pilot)
    monkeypatch.setattr(ClassifyTask, "losses", step)
    training = TrainingConfig(epochs=9, batch_size=4, precision="fp32")
    enhancer = tiny_cim().enhancer
    found = finetuned(enhancer, images, images, training, length=length, device=CPU, clock=Clock())
    assert counted == {"pilot": pilots, "step": steps}
    assert found["finetune_steps"] == steps


def test_finetuning__length_says_whether_there_is_any_and_how_much() -> None:
    lengths = [Length(0), Length(60, steps=0), Length(60), Length(0, steps=9)]
    assert [bool(length) for length in lengths] == [False, False, True, True]
    assert [length.fact() for length in lengths] == [0, "0 steps", 60, "9 steps"]


def fake_setting() -> Any:
    return SimpleNamespace(facts=lambda _: dict.fromkeys(SETTING, 0) | {"label": ""})


def made_runs(done: set[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(runs, "run", lambda _, method, seed, pilots: {"knn": seed / 10})
    monkeypatch.setattr(runs, "control", lambda *_: {"knn": 0.3})
    return runs.runs(fake_setting(), methods=["pixels", "random", "cim-respix"], seeds=2, done=done)


def test_runs__go_on_behind_a_cut_in_the_middle_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.jsonl"
    for record in itertools.islice(made_runs(set(), monkeypatch), 2):
        append(file, record)
    with file.open("a") as stream:
        stream.write('{"method": "cim-respix", "se')
    done = {runs.record_key(record) for record in read(file)}
    assert len(done) == 2
    for record in made_runs(done, monkeypatch):
        append(file, record)
    found = [(record["method"], record["seed"]) for record in read(file)]
    assert found == [("pixels", 0), ("random", 0), ("cim-respix", 0), ("random", 1), ("cim-respix", 1)]
    assert not list(made_runs({runs.record_key(record) for record in read(file)}, monkeypatch))


def test_records__a_cut_first_line_leaves_an_empty_file_to_go_on_with(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"a"')
    assert read(file) == []
    append(file, {"a": 1})
    assert read(file) == [{"a": 1}]


def test_rate__one_for_all_replaces_each_method_s_own() -> None:
    methods = ("cim-revdet", "mae", "pixels")

    def setting(rate: float | None) -> Any:
        return SimpleNamespace(rate=rate, training=TrainingConfig(steps=1, learning_rate=0.7))

    def rates(rate: float | None) -> list[float]:
        return [runs.Setting.training_of(setting(rate), method).learning_rate for method in methods]

    assert rates(None) == [3e-4, 1e-3, 0.7]
    assert rates(0.5) == [0.5, 0.5, 0.5]
