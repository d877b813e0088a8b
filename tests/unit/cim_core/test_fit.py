"""The step and the loop: accumulation, clipping, the finite guard, reports, stops; one and two ranks."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from cim_core.config import Duration, TrainingConfig
from cim_core.data.dataset import Views
from cim_core.durations import Plan
from cim_core.engine import dist
from cim_core.engine.fit import Pace
from cim_core.engine.step import StepResult, train_step
from cim_core.engine.transfer import Readback
from cim_core.errors import NonFiniteError
from cim_core.schedule import learning_rate
from tests.unit.cim_core.linear import PLAN, Broken, MeanTask, linear_state, step, views
from tests.unit.cim_core.tiny import CPU, Output, TinyNet, TinyTask, run, tiny_run, training, write_images


def weights_after(config: TrainingConfig, batch: Views) -> tuple[Tensor, StepResult]:
    state = linear_state(config)
    result = step(MeanTask(state.model), state, batch, config)
    return state.model.get_parameter("weight").detach().clone(), result


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation__equals_the_whole_batch(parts: int) -> None:
    whole, first = weights_after(training(accumulation=1, clip_norm=0), views())
    split, second = weights_after(training(accumulation=parts, clip_norm=0), views())
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-7)
    assert not torch.equal(whole, torch.full_like(whole, 0.1))
    for name in ("loss", "term", "grad_norm"):
        torch.testing.assert_close(second.metrics[name], first.metrics[name], rtol=1e-6, atol=1e-7)


def test_step__loss_and_gradient_norm_by_hand() -> None:
    config = training(accumulation=2)
    state, batch = linear_state(config), views()
    x = batch.pixels_B3HW.flatten(1).double() / 255
    error = x.sum(1) * 0.1 - 1
    gradient = torch.cat([2 * (error[:, None] * x).mean(0), 2 * error.mean()[None]])
    metrics = step(MeanTask(state.model), state, batch, config).metrics
    assert metrics["loss"].item() == pytest.approx(error.square().mean().item(), rel=1e-6)
    assert metrics["grad_norm"].item() == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_clipping__scales_all_gradients_to_the_norm() -> None:
    config = training(accumulation=1, clip_norm=0.5)
    state = linear_state(config)
    norm = step(MeanTask(state.model), state, views(), config).metrics["grad_norm"].item()
    clipped = torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])
    assert norm > 0.5, "the reported norm is the one before clipping"
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_learning_rate__reaches_every_group_before_the_update() -> None:
    config = training()
    state = linear_state(config)
    result = step(MeanTask(state.model), state, views(), config)
    expected = learning_rate(5, config, PLAN)
    assert result.learning_rate == expected > 0
    assert [group["lr"] for group in state.optimizer.param_groups] == [expected, expected]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision__of_the_forward_pass_only(precision: str, dtype: torch.dtype) -> None:
    config = training(precision=precision)
    state = linear_state(config)
    task = MeanTask(state.model)
    step(task, state, views(), config)
    assert set(task.dtypes) == {dtype}
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}


def test_randomness__global_generator_is_left_alone_and_passes_differ() -> None:
    drawn: list[float] = []

    class Drawing(MeanTask):
        def losses(self, batch: Views, **place: Any) -> Output:
            drawn.append(torch.rand(()).item())
            return super().losses(batch, **place)

    config = training(accumulation=2)
    states = [linear_state(config) for _ in range(2)]
    before = torch.get_rng_state()
    for state in states:
        step(Drawing(state.model), state, views(), config)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_fit__calls_in_order(images: Path, tmp_path: Path) -> None:
    calls = tiny_run(images, tmp_path, checkpoint_every=Duration(steps=6)).recorder.calls
    assert calls == [
        ("start", 0), ("sample", 0), ("step", 1), ("step", 3), ("sample", 5), ("step", 6), ("checkpoint", 6),
        ("step", 9), ("step", 10), ("sample", 10), ("checkpoint", 10),
    ]  # fmt: skip


def test_fit__stop_saves_where_it_stopped(images: Path, tmp_path: Path) -> None:
    stopped = tiny_run(images, tmp_path, stop_at=4)
    assert (stopped.result.step, stopped.result.stopped) == (4, True)
    assert stopped.recorder.calls[-1] == ("checkpoint", 4)


def test_fit__stop_at_a_checkpoint_saves_once(images: Path, tmp_path: Path) -> None:
    calls = tiny_run(images, tmp_path, stop_at=6, checkpoint_every=Duration(steps=6)).recorder.calls
    assert calls.count(("checkpoint", 6)) == 1


def test_fit__stop_in_the_last_step_is_a_finished_run(images: Path, tmp_path: Path) -> None:
    finished = tiny_run(images, tmp_path, stop_at=10)
    assert (finished.result.step, finished.result.stopped) == (10, False)


def test_fit__reports_hold_what_the_step_measured(images: Path, tmp_path: Path) -> None:
    reports = tiny_run(images, tmp_path).recorder.reports
    assert [r.step for r in reports] == [1, 3, 6, 9, 10]
    for report in reports:
        assert set(report.metrics) == {"loss", "loss/square", "progress", "grad_norm"}
        assert report.metrics["progress"] == pytest.approx((report.step - 1) / 10)
        assert report.learning_rate == learning_rate(report.step - 1, training(), PLAN)
        assert report.images_per_s > 0


def test_fit__a_resumed_run_reports_the_same_curve(images: Path, tmp_path: Path) -> None:
    whole = tiny_run(images, tmp_path / "whole").recorder.reports
    tiny_run(images, tmp_path / "cut", stop_at=5)
    model = TinyNet()
    resume = tmp_path / "cut" / "step-5"
    rest = run(images, tmp_path / "cut", model=model, task=TinyTask(model), config=training(), resume=resume)
    assert [(r.step, r.metrics) for r in rest.recorder.reports] == [
        (r.step, r.metrics) for r in whole if r.step > 5
    ]


def test_fit__needs_no_network_and_writes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the core opened a socket")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.unit.cim_core.tiny.save_state", lambda *_, **__: None)
    tiny_run(images, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pace__images_over_the_time_since_the_last_look() -> None:
    times = iter([100.0, 102.0, 106.0])
    pace = Pace(8, start=10, clock=lambda: next(times))
    assert pace.since_last(11) == pytest.approx(8 / 2)
    assert pace.since_last(16) == pytest.approx(5 * 8 / 4)


@pytest.fixture(scope="module")
def two_ranks(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw; starting them takes seconds, so once for all tests."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank_process, args=(str(images), str(out)), nprocs=2)  # type: ignore[no-untyped-call]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["loss", "gradient", "late"])
def test_two_ranks__nan_on_one_stops_both_before_the_weights_move(
    where: str, two_ranks: list[dict[str, Any]]
) -> None:
    for seen in two_ranks:
        assert seen[where]["message"].startswith("step 5:")
        assert ("term" in seen[where]["message"]) == (where == "loss")
        assert seen[where]["weight"] == pytest.approx([0.1] * 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks__accumulation_without_sync_equals_one_process(two_ranks: list[dict[str, Any]]) -> None:
    whole, result = weights_after(training(accumulation=1, batch_size=8), views(8))
    for seen in two_ranks:
        assert seen["accumulated"] == pytest.approx(whole.flatten().tolist(), rel=1e-5)
        assert seen["grad_norm"] == pytest.approx(result.metrics["grad_norm"].item(), rel=1e-5)
        assert seen["syncs_left_out"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks__only_rank_0_is_asked_to_stop_and_both_do(two_ranks: list[dict[str, Any]]) -> None:
    assert [seen["stopped"] for seen in two_ranks] == [[4, True], [4, True]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks__reports_are_means_over_ranks(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["reports"] == two_ranks[1]["reports"]
    assert {report["rank"] for report in two_ranks[0]["reports"]} == {0.5}


def _rank_process(rank: int, images: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{out}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    seen = {where: _broken(where) for where in ("loss", "gradient")}
    seen["late"] = _broken_late()
    seen |= _accumulated(rank) | _stopped(Path(images), Path(out))
    (Path(out) / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _broken(where: str) -> dict[str, Any]:
    config = training()
    state = linear_state(config)
    task = Broken(DistributedDataParallel(state.model), where=where, on_rank=1)
    try:
        step(task, state, views(), config)
        message = "nothing was raised"
    except NonFiniteError as error:
        message = str(error)
    return {"message": message, "weight": state.model.get_parameter("weight").flatten().tolist()}


def _broken_late() -> dict[str, Any]:
    """As on GPUs: rank 1 breaks, and both hear of it when the next step is queued."""
    config = training(fused_optimizer=True)
    state = linear_state(config)
    wrapped = DistributedDataParallel(state.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readback, "at_hand", False)
        broken = step(Broken(wrapped, where="gradient", on_rank=1), state, views(), config)
        train_step(MeanTask(wrapped), state, views(), plan=PLAN, training=config, device=CPU)
        with pytest.raises(NonFiniteError) as error:
            broken.read(state)
    return {"message": str(error.value), "weight": state.model.get_parameter("weight").flatten().tolist()}


def _accumulated(rank: int) -> dict[str, Any]:
    config = training(accumulation=2, batch_size=8)
    state = linear_state(config)
    module = DistributedDataParallel(state.model)
    left_out: list[int] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        left_out.append(1)
        with module.no_sync():
            yield

    batch = views(4, first=4 * rank)
    result = step(MeanTask(module), state, batch, config, no_sync=no_sync)
    return {
        "accumulated": state.model.get_parameter("weight").flatten().tolist(),
        "grad_norm": result.metrics["grad_norm"].item(),
        "syncs_left_out": len(left_out),
    }


def _stopped(images: Path, out: Path) -> dict[str, Any]:
    class Ranked(TinyTask):
        def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
            output = super().losses(batch, step=step, micro=micro, rank=rank, progress=progress)
            return Output(output.loss, {**output.metrics, "rank": torch.tensor(float(rank))})

    model = TinyNet()
    task = Ranked(DistributedDataParallel(model, find_unused_parameters=True))
    stop_at = 4 if dist.rank() == 0 else 2  # rank 1's wish must not count
    done = run(images, out, model=model, task=task, config=training(), stop_at=stop_at)
    return {
        "stopped": [done.result.step, done.result.stopped],
        "reports": [dict(report.metrics) for report in done.recorder.reports],
    }


def test_plan__of_these_tests_has_no_warmup_left_at_step_5() -> None:
    assert isinstance(PLAN, Plan)
    assert PLAN.warmup_steps <= 5 < PLAN.total_steps
