"""Layouts, the fused update and the compiler: the same numbers but for rounding, and refusals that teach."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cim_core.cim import CIM
from cim_core.config import TrainingConfig
from cim_core.durations import plan
from cim_core.engine import acceleration
from cim_core.engine.acceleration import accelerate
from cim_core.engine.state import TrainState, load_state, save_state
from cim_core.engine.step import train_step
from cim_core.errors import ConfigError
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer
from cim_core.tokenizers.network import initialise
from tests.unit.cim_core import tiny
from tests.unit.cim_core.cim_models import model_config, rng, tiny_cim, views_for

CPU = torch.device("cpu")
STEPS = 3
TOLERANCE = 1e-4  # relative, of losses after a resume. How far options move a curve: test_tolerance.py


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 8, "batch_size": 4, "precision": "fp32", **options})


def cnn() -> CIM:
    """A CNN beside a tokenizer of convolutions."""
    tokenizer = DalleTokenizer(DalleConfig(width=8, blocks_per_group=1, vocab_size=16), origin={})
    initialise(tokenizer, generator=rng())
    with torch.no_grad():
        tokenizer.table.weight.copy_(torch.randn(tokenizer.table.weight.shape, generator=rng()))
        tokenizer.table.bias.zero_()
    return tiny_cim(model_config(name="test_resnet"), tokenizer=tokenizer)


def trained(training: TrainingConfig, *, steps: int = STEPS) -> tuple[TrainState, list[float]]:
    cim = cnn()
    accelerate(cim, training, CPU)
    state = TrainState(model=cim.train(), optimizer=build_optimizer(cim, training))
    return state, go_on(state, training, steps=steps)


def go_on(state: TrainState, training: TrainingConfig, *, steps: int) -> list[float]:
    course, losses = plan(training, num_images=8), []
    for _ in range(steps):
        assert isinstance(state.model, CIM)
        batch = views_for(state.model, num_images=4, seed=state.step)
        result = train_step(
            cim_task(state.model, seed=0), state, batch, plan=course, training=training, device=CPU
        )
        losses.append(result.metrics["loss"].item())
    return losses


def is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_channels_last__reaches_enhancer_and_tokenizer_and_no_names() -> None:
    plain, fast = cnn(), cnn()
    accelerate(fast, config(channels_last=True), CPU)
    tokenizer = fast.tokenizer
    assert isinstance(tokenizer, nn.Module)
    for module in (fast.enhancer, tokenizer):
        wide = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert wide
        assert all(map(is_channels_last, wide))
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_defaults__on_a_cpu_change_nothing() -> None:
    model = cnn()
    accelerate(model, config(), CPU)
    assert not any(is_channels_last(p) for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1)
    assert not build_optimizer(model, config()).defaults["fused"]
    assert build_optimizer(model, config(fused_optimizer=True)).defaults["fused"]


@pytest.mark.parametrize("before", [True, False])
def test_resume__whatever_the_layout_was_moments_follow_the_weights(*, before: bool, tmp_path: Path) -> None:
    """A fused update refuses moments whose strides are not those of the weights."""
    first = config(channels_last=before, fused_optimizer=True)
    then = replace(first, channels_last=not before)
    saved, _ = trained(first)
    save_state(saved, tmp_path, fingerprint={})
    whole = go_on(saved, first, steps=2)
    model = cnn()
    accelerate(model, then, CPU)
    state = TrainState(model=model.train(), optimizer=build_optimizer(model, then))
    load_state(state, tmp_path, fingerprint={})
    for parameter, moments in state.optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    assert go_on(state, then, steps=2) == pytest.approx(whole, rel=TOLERANCE)


def test_compile__a_broken_compiler_is_a_lesson(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> object:
        raise RuntimeError("Failed to find C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        ConfigError, match=r"^training\.compile: .*got true: Failed to find C\+\+ compiler;"
    ) as e:
        accelerate(cnn(), config(compile=True), CPU)
    assert "set false" in str(e.value)
    assert "trace" not in str(e.value)


def test_compile__every_network_and_the_frozen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(acceleration, "check_compiler", lambda _: None)
    cim = cnn()
    accelerate(cim, config(), CPU)
    assert compiled == []
    accelerate(cim, config(compile=True), CPU)
    tokenizer = cim.tokenizer
    assert isinstance(tokenizer, DalleTokenizer)
    expected = {cim.enhancer, cim.generator, cim.objective, tokenizer.encoder, tokenizer.decoder}
    assert expected <= set(compiled)


def refusing(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend of torch.compile that can compile nothing."""
    del graph, inputs
    raise NotImplementedError("no kernel for this network\nand a long trace")


def fitted(tmp_path: Path, **of_compile: Any) -> None:
    """A training of tiny.py whose network is compiled, as always, by its first step."""
    model = tiny.TinyNet()
    model.stem.compile(**of_compile)
    images = tiny.write_images(tmp_path / "images")
    tiny.run(images, tmp_path, model=model, task=tiny.TinyTask(model), config=tiny.training())


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile__a_network_that_a_backend_refuses_is_a_lesson(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        fitted(tmp_path, backend=refusing)
    assert str(e.value) == (
        "training.compile: torch cannot compile a network of this run, got true: "
        "NotImplementedError: no kernel for this network; set training.compile: false"
    )
    assert isinstance(e.value.__cause__, torch._dynamo.exc.BackendCompilerFailed)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile__a_network_that_inductor_fails_on_is_a_lesson() -> None:
    """With torch's own patch of its settings: undoing pytest's would leave the setting deleted."""
    network = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LayerNorm(2))
    network.compile()
    lesson = r"^training\.compile: .*got true: .*compiler.*; set"
    nameless = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with nameless, pytest.raises(ConfigError, match=lesson) as e:  # noqa: SIM117
        with acceleration.explained_compiling():
            network(torch.ones(3, 2))
    assert isinstance(e.value.__cause__, torch._dynamo.exc.TorchDynamoException)


def test_compile__other_errors_of_a_training_pass_through() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), acceleration.explained_compiling():
        raise RuntimeError("out of memory")
