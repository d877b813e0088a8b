"""The collectives, on one process and on two real ones (gloo, started through a file)."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from cim_core.engine import dist

# Rank 0 holds one row, rank 1 holds two: ranks need not hold equally many.
ROWS = (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))


def test_one_process__every_collective_is_the_identity() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert (dist.rank(), dist.world_size()) == (0, 1)
    for collective in (dist.all_reduce_sum, dist.broadcast_from_0, dist.gather_rows):
        assert torch.equal(collective(x), x)
        assert not collective(x).requires_grad
    assert dist.any_rank(torch.tensor(1))
    assert not dist.any_rank(torch.tensor([0]))
    assert dist.row_counts(x) == [1]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks got from every collective."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank_process, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_ranks__know_who_they_are(seen: list[dict[str, torch.Tensor]]) -> None:
    assert [(s["rank"].item(), s["world_size"].item()) for s in seen] == [(0, 2), (1, 2)]


def test_all_reduce_sum__both_get_the_sum_and_keep_their_own(seen: list[dict[str, torch.Tensor]]) -> None:
    expected = ROWS[0] + ROWS[1][:1]
    for rank, result in enumerate(seen):
        assert torch.equal(result["sum"], expected)
        assert torch.equal(result["untouched"], ROWS[rank])


def test_all_reduce_sum__takes_any_memory_order(seen: list[dict[str, torch.Tensor]]) -> None:
    for result in seen:
        assert torch.equal(result["sum_of_transposed"], 2 * torch.arange(6.0).view(2, 3).t())


def test_broadcast__both_have_what_rank_0_had(seen: list[dict[str, torch.Tensor]]) -> None:
    for result in seen:
        assert torch.equal(result["broadcast"], ROWS[0])


def test_gather_rows__unequal_ranks_in_their_order(seen: list[dict[str, torch.Tensor]]) -> None:
    for result in seen:
        assert torch.equal(result["gathered"], torch.cat(ROWS))
        assert result["row_counts"].tolist() == [1, 2]


def test_any_rank__one_true_is_enough(seen: list[dict[str, torch.Tensor]]) -> None:
    for result in seen:
        assert result["any"].tolist() == [True, True, False]


def _rank_process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = ROWS[rank].clone()
    one_true = rank == 1
    results = {
        "rank": torch.tensor(dist.rank()),
        "world_size": torch.tensor(dist.world_size()),
        "sum": dist.all_reduce_sum(rows[:1]),
        "sum_of_transposed": dist.all_reduce_sum(torch.arange(6.0).view(2, 3).t()),
        "broadcast": dist.broadcast_from_0(rows[:1]),
        "gathered": dist.gather_rows(rows),
        "row_counts": torch.tensor(dist.row_counts(rows)),
        "any": torch.tensor(
            [dist.any_rank(one_true), dist.any_rank(torch.tensor(one_true)), dist.any_rank(rank == 2)]
        ),
        "untouched": rows,
    }
    contiguous = {name: value.contiguous().clone() for name, value in results.items()}
    save_file(contiguous, Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()
