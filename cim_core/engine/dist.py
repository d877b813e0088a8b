"""The few collectives that the core needs; on one process each of them is the identity.

Shape letters in this file:
    R  rows on this rank (may differ between ranks)      S  rows over all ranks

No function changes its argument. Every rank has to call the same functions in the same order.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank() -> int:
    """The number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if _distributed() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if _distributed() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` (any shape, equal on all ranks) over the ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def broadcast_from_0(x: Tensor) -> Tensor:
    """Rank 0's `x`; the other ranks pass a tensor of the same shape and dtype."""
    if world_size() == 1:
        return x.detach()
    sent = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(sent, src=0)
    return sent


def any_rank(flag: Tensor | int) -> bool:
    """Whether `flag` (a truth value or a tensor of one element) is true on at least one rank."""
    if world_size() == 1:
        return bool(flag)
    device = flag.device if isinstance(flag, Tensor) else _collective_device()
    count = torch.as_tensor(flag, device=device).reshape(1).to(torch.int32)
    return bool(all_reduce_sum(count).item())


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks below each other, rank 0 first: [R, ...] to [S, ...], without gradient.

    The number of rows may differ between ranks, all other sides and the dtype must not.
    """
    if world_size() == 1:
        return x.detach()
    counts = row_counts(x)
    largest = max(counts)
    padding = [0, 0] * (x.dim() - 1) + [0, largest - len(x)]
    # Collectives want equal shapes, so short ranks send rows that are cut off again below.
    padded = F.pad(x.detach(), padding).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def row_counts(x: Tensor) -> list[int]:
    """How many rows each rank's `x` [R, ...] has, in the order of the ranks."""
    if world_size() == 1:
        return [len(x)]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    return [int(count) for count in all_reduce_sum(counts).tolist()]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    """NCCL moves only memory of the GPU, gloo takes the CPU's."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
