"""Two real ranks train the codebook and the weights that one process makes of the joined batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from cim_core.config import TokenizerConfig
from cim_core.engine import dist
from cim_core.tokenizers.dvae import DiscreteVAE

# The high bar lets codes restart in every step, with rows that either rank may hold.
CONFIG = TokenizerConfig(image_size=8, stride=2, width=4, vocab_size=12, code_dim=4, restart_below=0.5)
STEPS = 4
pytestmark = pytest.mark.slow  # two processes that import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank_process, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_ranks__end_with_equal_states(ranks: list[dict[str, Tensor]]) -> None:
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_two_ranks__equal_one_process_on_the_joined_batch(ranks: list[dict[str, Tensor]]) -> None:
    """Up to the order of the sums."""
    alone = _train(rank=0, world_size=1)
    assert alone["restarts"].sum() > 0
    assert torch.equal(alone["restarts"], ranks[0]["restarts"])
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def _rank_process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    save_file(_train(rank=rank, world_size=2), Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def _train(*, rank: int, world_size: int) -> dict[str, Tensor]:
    assert dist.world_size() == world_size
    model = DiscreteVAE(CONFIG, generator=torch.Generator().manual_seed(0)).train()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    restarts = []
    for step in range(STEPS):
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(100 + step))
        mine = images.chunk(world_size)[rank]
        # Each rank brings a generator of its own, as the task does; rank 0's picks count.
        generator = torch.Generator().manual_seed(1000 * step + rank)
        output = wrapped(mine, progress=0.0, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        restarts.append(output.metrics["restarts"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state | {"restarts": torch.stack(restarts)}
