"""The running average of the enhancer's weights: against a loop by hand, and where it must not interfere."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cim_core.cim import CIM
from cim_core.config import TrainingConfig
from cim_core.durations import Plan
from cim_core.ema import RunningAverage, update_averages
from cim_core.engine import step as step_module
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.errors import NonFiniteError
from cim_core.export import encoder_weights, export_encoder
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from tests.unit.cim_core.cim_models import model_config, tiny_cim, views_for

DECAY = 0.7
CPU = torch.device("cpu")


def cim_with_average(name: str = "vit_tiny_patch16_224") -> CIM:
    config = model_config(name=name)
    return tiny_cim(replace(config, enhancer=replace(config.enhancer, ema_decay=DECAY)))


def average_of(cim: CIM) -> RunningAverage:
    assert cim.average is not None
    return cim.average


def train(
    cim: CIM, *, steps: int, module: nn.Module | None = None, accumulation: int = 2
) -> list[dict[str, Tensor]]:
    """The enhancer's tensors after each step."""
    training = TrainingConfig(
        steps=steps, batch_size=4, accumulation=accumulation, learning_rate=0.01, precision="fp32"
    )
    plan = Plan(total_steps=steps, warmup_steps=0, checkpoint_steps=frozenset(), sample_steps=frozenset(),
                batch_size=4, num_images=8)  # fmt: skip
    state = TrainState(model=cim, optimizer=build_optimizer(cim, training))
    task = cim_task(module or cim, seed=0)
    seen = []
    for number in range(steps):
        batch = views_for(cim, num_images=4, seed=number)
        train_step(task, state, batch, plan=plan, training=training, device=CPU)
        seen.append({name: x.detach().clone() for name, x in cim.enhancer.backbone.state_dict().items()})
    return seen


def by_hand(seen: list[dict[str, Tensor]], name: str) -> Tensor:
    average = seen[0][name].double()
    for weights in seen[1:]:
        average = DECAY * average + (1 - DECAY) * weights[name].double()
    return average


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
def test_average__matches_a_loop_by_hand(name: str) -> None:
    cim = cim_with_average(name)
    seen = train(cim, steps=4)
    averaged = average_of(cim).module
    moved = 0
    for key, parameter in averaged.named_parameters():
        assert torch.allclose(parameter.double(), by_hand(seen, key), rtol=1e-5, atol=1e-7), key
        moved += not torch.allclose(parameter, seen[-1][key], rtol=1e-5, atol=1e-7)
    assert moved > 5
    for key, buffer in averaged.named_buffers():
        assert torch.equal(buffer, cim.enhancer.backbone.get_buffer(key)), key


def test_average__moves_once_a_step_however_many_micro_batches() -> None:
    cim = cim_with_average()
    train(cim, steps=3, accumulation=4)
    assert int(average_of(cim).n_averaged) == 3


def test_average__a_loop_that_forgets_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "update_averages", lambda model, **_: None)
    cim = cim_with_average()
    seen = train(cim, steps=2)
    weights = dict(average_of(cim).module.named_parameters())
    assert not torch.allclose(weights["norm.weight"].double(), by_hand(seen, "norm.weight"), rtol=1e-5)


def test_average__does_not_change_the_training() -> None:
    plain = train(tiny_cim(model_config()), steps=3)
    averaged = train(cim_with_average(), steps=3)
    assert all(torch.equal(plain[-1][key], averaged[-1][key]) for key in plain[-1])


def test_average__is_frozen_and_unknown_to_the_optimizer() -> None:
    cim = cim_with_average()
    train(cim, steps=1)
    ours = {id(p) for p in average_of(cim).parameters()}
    assert ours
    groups = build_optimizer(cim, TrainingConfig(steps=1)).param_groups
    assert not ours & {id(p) for group in groups for p in group["params"]}
    assert all(p.grad is None and not p.requires_grad for p in average_of(cim).parameters())


def test_average__names_in_the_state_are_the_networks_own() -> None:
    cim = cim_with_average()
    names = {name for name in cim.state_dict() if name.startswith("average.")}
    own = {f"average.module.{name}" for name in cim.enhancer.backbone.state_dict()}
    assert names == own | {"average.n_averaged"}
    assert tiny_cim(model_config()).average is None


def test_average__a_broken_step_leaves_it_alone() -> None:
    cim = cim_with_average()
    train(cim, steps=2)
    before = {name: x.clone() for name, x in average_of(cim).state_dict().items()}
    with torch.no_grad():
        cim.objective.head.proj.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError):
        train(cim, steps=1)
    assert all(torch.equal(before[name], x) for name, x in average_of(cim).state_dict().items())


def test_export__takes_the_average_where_there_is_one(tmp_path: Path) -> None:
    cim = cim_with_average()
    seen = train(cim, steps=3)
    weights = encoder_weights(cim)
    assert torch.allclose(weights["norm.weight"].double(), by_hand(seen, "norm.weight"), rtol=1e-5)
    assert not torch.equal(weights["norm.weight"], seen[-1]["norm.weight"])
    folder = export_encoder(cim, tmp_path, card={})
    assert torch.equal(load_file(folder / "model.safetensors")["norm.weight"], weights["norm.weight"])
    assert "| Weights | running average over the steps, decay 0.7 |" in (folder / "README.md").read_text()


def test_export__takes_the_last_weights_otherwise(tmp_path: Path) -> None:
    cim = tiny_cim(model_config())
    seen = train(cim, steps=2)
    assert torch.equal(encoder_weights(cim)["norm.weight"], seen[-1]["norm.weight"])
    folder = export_encoder(cim, tmp_path, card={})
    assert "| Weights | of the last step |" in (folder / "README.md").read_text()


def test_update__equals_torchs_own_bit_for_bit() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ours = RunningAverage(net, decay=0.99)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # type: ignore[no-untyped-call]
    for _ in range(4):
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor += torch.ones_like(tensor) if tensor.dtype == torch.int64 else torch.randn_like(tensor)
        ours.update()
        theirs.update_parameters(net)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("moved_before", [0, 2])
def test_update__not_where_the_step_was_broken(moved_before: int) -> None:
    net = nn.Linear(2, 1)
    average = RunningAverage(net, decay=0.5)
    with torch.no_grad():
        for _ in range(moved_before):
            net.weight.add_(1)
            average.update(unless=torch.tensor(0.0))
    before = {name: x.clone() for name, x in average.state_dict().items()}
    with torch.no_grad():
        net.weight.add_(1)
    average.update(unless=torch.tensor(1.0))
    assert int(before["n_averaged"]) == moved_before
    assert all(torch.equal(before[name], x) for name, x in average.state_dict().items())


def test_update__finds_every_average_in_a_model() -> None:
    net = nn.Linear(2, 1)
    average = RunningAverage(net, decay=0.5)
    model = nn.ModuleDict({"net": net, "inside": nn.Sequential(average)})
    update_averages(model)
    with torch.no_grad():
        net.weight.add_(1)
    update_averages(model)
    assert torch.allclose(net.weight - average.module.get_parameter("weight"), torch.tensor(0.5))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Each rank's average and weights after three steps of a network with batch norm, which it recomputes."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank_process, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks__have_the_same_average(two_ranks: list[dict[str, Tensor]]) -> None:
    first, second = two_ranks
    parameters = [name for name in first if not name.endswith(("running_mean", "running_var"))]
    assert len(parameters) > 10
    assert [name for name in parameters if not torch.equal(first[name], second[name])] == []
    assert not torch.equal(first["average.module.conv1.0.weight"], first["enhancer.backbone.conv1.0.weight"])


def _rank_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    config = model_config(name="test_resnet")
    enhancer = replace(config.enhancer, ema_decay=DECAY, grad_checkpointing=True)
    cim = tiny_cim(replace(config, enhancer=enhancer))
    train(cim, steps=3, module=DistributedDataParallel(cim))
    save_file(
        {name: x.contiguous().clone() for name, x in cim.state_dict().items()}, f"{folder}/{rank}.safetensors"
    )
    torch.distributed.destroy_process_group()
