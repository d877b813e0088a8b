"""What is not finite: told before anything moves, or a step late as on a GPU, with the same weights left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cim_core.config import Duration
from cim_core.data.dataset import Views
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.engine.transfer import Readback
from cim_core.errors import NonFiniteError
from tests.unit.cim_core.linear import PLAN, Broken, MeanTask, linear_state, step, views
from tests.unit.cim_core.tiny import CPU, Output, TinyNet, TinyTask, run, tiny_run, training, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU behaves as a GPU does: a step's numbers are not there when the step was queued."""
    monkeypatch.setattr(Readback, "at_hand", False)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"step 5: the loss is not finite \(broken: term\); no weight was changed"),
        ("gradient", "step 5: the gradient is not finite although the loss is"),
    ],
)
def test_non_finite__raises_before_anything_moves(where: str, message: str) -> None:
    config = training()
    state = linear_state(config)
    with pytest.raises(NonFiniteError, match=message):
        step(Broken(state.model, where=where), state, views(), config)
    assert torch.equal(state.model.get_parameter("weight"), torch.full((1, 12), 0.1))
    assert (state.step, dict(state.optimizer.state)) == (5, {})
    assert all(p.grad is None for p in state.model.parameters())


class BrokenAt(Broken):
    """Broken in the step after `at` completed ones, and in no other."""

    def __init__(self, module: nn.Module, *, where: str, at: int) -> None:
        super().__init__(module, where=where)
        self.at = at

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        self.on_rank = rank if step == self.at else -1
        return super().losses(batch, step=step, micro=micro, rank=rank, progress=progress)


def contents(state: TrainState) -> list[Tensor]:
    """All weights and moments, copied."""
    moments = [x for kept in state.optimizer.state.values() for x in kept.values()]
    return [x.detach().clone() for x in (*state.model.state_dict().values(), *moments)]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite__known_a_step_late_is_as_if_known_at_once(where: str) -> None:
    """The broken step and the one queued behind it move neither weights nor moments, and the step is told."""
    config = training(fused_optimizer=True)
    state = linear_state(config)
    task = BrokenAt(state.model, where=where, at=6)
    step(task, state, views(), config).read(state)
    before = contents(state)
    broken = train_step(task, state, views(), plan=PLAN, training=config, device=CPU)
    after = train_step(task, state, views(), plan=PLAN, training=config, device=CPU)
    assert after.metrics["grad_norm"].isfinite()
    with pytest.raises(NonFiniteError, match=r"^step 6: .*no weight was changed"):
        broken.read(state)
    assert all(map(torch.equal, contents(state), before))
    assert state.step == 6
    assert all(p.grad is None for p in state.model.parameters())
    train_step(MeanTask(state.model), state, views(), plan=PLAN, training=config, device=CPU).read(state)
    assert not torch.equal(contents(state)[0], before[0]), "the flag is down again"


@pytest.mark.usefixtures("late")
def test_non_finite__an_optimizer_that_cannot_skip_is_told_at_once() -> None:
    state = linear_state(training(fused_optimizer=False))
    with pytest.raises(NonFiniteError, match="step 5"):
        step(Broken(state.model, where="gradient"), state, views(), training(fused_optimizer=False))
    assert torch.equal(state.model.get_parameter("weight"), torch.full((1, 12), 0.1))


def test_non_finite__a_metric_alone_is_no_error() -> None:
    config = training()
    state = linear_state(config)
    result = step(Broken(state.model, where="metric"), state, views(), config)
    assert result.metrics["term"].isinf()
    assert state.step == 6


@pytest.mark.usefixtures("late")
def test_fit__late_numbers_change_no_call_but_a_stop(images: Path, tmp_path: Path) -> None:
    """Reports come a step later, in the same order; a wish to stop is known when the next step is queued."""
    changes: dict[str, Any] = {"checkpoint_every": Duration(steps=6), "fused_optimizer": True}
    whole = tiny_run(images, tmp_path / "whole", **changes)
    assert whole.recorder.calls == [
        ("start", 0), ("sample", 0), ("step", 1), ("step", 3), ("sample", 5), ("step", 6), ("checkpoint", 6),
        ("step", 9), ("step", 10), ("sample", 10), ("checkpoint", 10),
    ]  # fmt: skip
    stopped = tiny_run(images, tmp_path / "cut", stop_at=3, **changes)
    assert (stopped.result.step, stopped.result.stopped) == (4, True)
    assert stopped.recorder.calls[-1] == ("checkpoint", 4)


@pytest.mark.usefixtures("late")
def test_fit__late_and_at_once_train_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tiny_run(images, tmp_path / "late", fused_optimizer=True)
    monkeypatch.setattr(Readback, "at_hand", True)
    once = tiny_run(images, tmp_path / "once", fused_optimizer=True)
    assert all(map(torch.equal, contents(late.state), contents(once.state)))
    assert [r.metrics for r in late.recorder.reports] == [r.metrics for r in once.recorder.reports]


@pytest.mark.usefixtures("late")
def test_fit__nan_found_late_leaves_the_steps_before_it(images: Path, tmp_path: Path) -> None:
    model = TinyNet()
    task = BreaksAfter(model, good_steps=4)
    with pytest.raises(NonFiniteError, match="step 4: the loss is not finite"):
        run(images, tmp_path, model=model, task=task, config=training(fused_optimizer=True))
    good = TinyNet()
    config = training(fused_optimizer=True)
    run(images, tmp_path / "good", model=good, task=TinyTask(good), config=config, stop_at=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, good.get_parameter(name)), name


@pytest.mark.parametrize("at", [6, 10], ids=["at_a_checkpoint", "at_the_end"])
@pytest.mark.parametrize("at_hand", [False, True], ids=["late", "at_once"])
def test_fit__nan_in_the_step_of_a_checkpoint_is_never_saved(
    at: int,
    at_hand: bool,  # noqa: FBT001
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No checkpoint is asked for, and the weights are those before the step."""
    monkeypatch.setattr(Readback, "at_hand", at_hand)
    model, config = TinyNet(), training(fused_optimizer=True)
    task = BreaksAfter(model, good_steps=at - 1)
    with pytest.raises(NonFiniteError, match=f"step {at - 1}: the loss is not finite"):
        run(
            images, tmp_path / "bad", model=model, task=task, config=config,
            checkpoint_steps=frozenset({at, 10}),
        )  # fmt: skip
    assert not (tmp_path / "bad").exists()
    good = TinyNet()
    run(
        images, tmp_path, model=good, task=TinyTask(good), config=config, stop_at=at - 1,
        checkpoint_steps=frozenset({at - 1}),
    )  # fmt: skip
    saved = load_file(tmp_path / f"step-{at - 1}" / "state.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"model/{name}"]), name


class BreaksAfter(TinyTask):
    """NaN from the step after `good_steps` on."""

    def __init__(self, module: nn.Module, *, good_steps: int) -> None:
        super().__init__(module)
        self.good_steps = good_steps

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        output = super().losses(batch, step=step, micro=micro, rank=rank, progress=progress)
        return output if step < self.good_steps else Output(output.loss * torch.nan, output.metrics)
