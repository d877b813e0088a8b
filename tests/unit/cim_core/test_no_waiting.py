"""A step never asks a GPU for a number: on a pretended GPU, and counted on the CPU with its backward pass."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cim_core.cim import build_cim
from cim_core.config import MaskingConfig, Method, ModelConfig, TrainingConfig
from cim_core.data.dataset import Views
from cim_core.durations import plan
from cim_core.engine import step as step_module
from cim_core.engine.state import TrainState
from cim_core.engine.step import StepResult, train_step
from cim_core.engine.transfer import Copies
from cim_core.estimate import dry_run
from cim_core.optim import build_optimizer
from cim_core.pretraining import Pretraining
from cim_core.task import cim_task
from cim_core.tokenizers.dalle import DalleConfig, dalle_on_meta
from tests.unit.cim_core.cim_models import model_config, peer_config, tiny_cim, tiny_peer, views_for

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
)
COPIES = (aten._to_copy.default, aten.copy_.default)
BATCH, PARTS = 4, 2
TRAINING = TrainingConfig(
    steps=8, batch_size=BATCH, accumulation=PARTS, precision="fp32", fused_optimizer=True
)
CASES = [("vit_tiny_patch16_224", "respix"), ("vit_tiny_patch16_224", "revdet"), ("test_resnet", "respix")]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operations for which the host would wait, by name and device of what they look at.

    On a pretended GPU a mask has no numbers, so `nonzero` is given some.
    """

    def __init__(self, *, pretends: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pretends = pretends
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in READS or _is_indexed_by_truth(func, args) or _is_blocking_copy(func, args, kwargs):
            self.waits.append((func.overloadpacket.__name__, args[0].device.type))
        if self.pretends and func is aten.nonzero.default:
            return args[0].new_empty(5, args[0].dim(), dtype=torch.int64)
        if self.pretends and func is aten._local_scalar_dense.default:
            return 1
        return func(*args, **kwargs)


def _is_indexed_by_truth(func: Any, args: Sequence[Any]) -> bool:
    if func not in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        return False
    return any(i is not None and i.dtype == torch.bool for i in args[1])


def _is_blocking_copy(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Between two kinds of device, waiting for its end."""
    if func not in COPIES:
        return False
    other = args[1].device if func is aten.copy_.default else kwargs.get("device") or args[0].device
    blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    return bool(torch.device(other).type != args[0].device.type and blocks)


def do_step(cim: Pretraining, views: Views, device: torch.device) -> StepResult:
    state = TrainState(model=cim.train(), optimizer=build_optimizer(cim, TRAINING))
    course = plan(TRAINING, num_images=8)
    return train_step(cim_task(cim, seed=0), state, views, plan=course, training=TRAINING, device=device)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch refuses without a driver: generators, events, pages, and the backward pass."""

    class Event:
        def record(self) -> None:
            """Nothing is queued."""

    def fake(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
        is_weight = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made

    monkeypatch.setattr(dry_run, "_fake", fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(step_module, "own_randomness", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.parametrize(("name", "objective"), CASES)
@pytest.mark.usefixtures("pretended_gpu")
def test_step__asks_a_gpu_nothing(name: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_average(model_config(name=name, objective=objective))
    with torch.device("meta"):
        cim = build_cim(config, dalle_on_meta(DalleConfig(width=2, vocab_size=16), origin={}))

    def backward(_: Tensor) -> None:
        for parameter in cim.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    watch = Watch(pretends=True)
    with FakeTensorMode(), watch:
        dry_run.fake_weights(cim)
        assert isinstance(cim.tokenizer, torch.nn.Module)
        dry_run.fake_weights(cim.tokenizer)
        views = Views(
            pixels_B3HW=torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8, device=GPU),
            token_pixels_B3HW=torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8, device=GPU),
            ids_B2=torch.empty(BATCH, 2),
        )
        watch.waits.clear()
        result = do_step(cim, views, GPU)
    assert result.metrics["loss"].device == GPU
    assert not result.numbers.at_hand
    assert watch.waits == [("nonzero", "cpu")] * PARTS, "the mask is on the CPU, and nothing else is asked"


def with_average(config: ModelConfig) -> ModelConfig:
    return replace(config, enhancer=replace(config.enhancer, ema_decay=0.9))


@pytest.mark.parametrize(("name", "objective"), CASES[:2])
def test_step__reads_nothing_but_its_mask_in_both_passes(name: str, objective: str) -> None:
    cim = tiny_cim(with_average(model_config(name=name, objective=objective)))
    views = views_for(cim, num_images=BATCH)
    with Watch() as watch:
        do_step(cim, views, torch.device("cpu"))
    assert watch.waits == [("nonzero", "cpu")] * PARTS


@pytest.mark.parametrize(("method", "reads"), [("beit", 1), ("simmim", 0), ("mae", 0)])
def test_step__of_a_peer_reads_no_more(method: Method, reads: int) -> None:
    # Blocks are placed number by number, on the CPU.
    model = tiny_peer(with_average(peer_config(method, masking=MaskingConfig(strategy="random"))))
    views = views_for(model, num_images=BATCH)
    with Watch() as watch:
        do_step(model, views, torch.device("cpu"))
    assert watch.waits == [("nonzero", "cpu")] * (PARTS * reads)


@pytest.mark.usefixtures("pretended_gpu")
def test_copies__are_begun_without_waiting_and_waited_for_by_who_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story: list[str] = []

    class Event:
        def record(self) -> None:
            story.append("record")

        def synchronize(self) -> None:
            story.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Watch(pretends=True)
    with FakeTensorMode(), watch:
        copies = Copies({"weight": torch.empty(2, 3, 4, 4, device=GPU).to(memory_format=torch.channels_last)})
        assert (watch.waits, story) == ([], ["record"])
        weight = copies.wait()["weight"]
    assert story == ["record", "wait"]
    assert (weight.device.type, weight.is_contiguous()) == ("cpu", True)


def test_copies__of_a_cpu_are_their_own_at_once() -> None:
    weight = torch.arange(6.0).view(2, 3)
    copies = Copies({"weight": weight, "turned": weight.t()})
    weight.zero_()
    assert copies.wait()["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copies.wait()["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copies.wait()["turned"].is_contiguous()
