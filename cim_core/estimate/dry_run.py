"""Code run without numbers: how much it multiplies and how much memory it holds.

`dry_run` turns every new tensor into a fake one that has a shape, a type and a (pretended) device, but
no memory, so a step of the largest network takes a second. Two meters watch what happens there.

What depends on numbers has no answer on fake tensors. `DryRun` gives the few that a training step asks
for; a new kind of question raises an error of torch's, and is to be added here.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


@contextmanager
def dry_run(*, masked_share: float = 0.5) -> Iterator["MemoryMeter"]:
    """Everything inside runs on fake tensors; yields the meter of their memory.

    `masked_share` is the share of positions that a truth mask is taken to select.
    """
    with FakeTensorMode(), MemoryMeter() as meter, _Answers(masked_share):
        yield meter


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that were made under this mode and are still held, and their highest sum.

    What was there before is left out, also where views and in-place operations return it. Memory that a
    single operation takes and gives back inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        for storage in _storages((args, kwargs)):
            self._hold(storage, size_bytes=0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._hold(storage, size_bytes=storage.nbytes())
        return result

    def _hold(self, storage: torch.UntypedStorage, *, size_bytes: int) -> None:
        """Count a storage that is not known yet until its last owner lets it go, autograd among them."""
        key = id(storage)
        if key in self._known:
            return

        def release(_: object) -> None:
            del self._known[key]
            self.held_bytes -= size_bytes

        self._known[key] = weakref.ref(storage, release)
        self.held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what only numbers could: truth is False, a number is 1, a mask selects its usual share."""

    def __init__(self, masked_share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share = masked_share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1
        if func is aten.bincount.default:
            return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0))
        if func is aten.nonzero.default:
            return args[0].new_empty(round(self._share * args[0].numel()), args[0].dim(), dtype=torch.int64)
        if func is aten.exponential_.default:
            return args[0]
        return func(*args, **kwargs)


def multiplications(run: Callable[[], object]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in `run`, on fake tensors.

    Torch counts two operations for each. Releases before 2.15 may not know the CPU's fused attention.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        run()
    num_operations: int = counter.get_total_flops()
    return num_operations // 2


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query_shape, key_shape, value_shape)  # type: ignore[no-untyped-call]
    return flops


_ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def fake_weights(module: nn.Module) -> None:
    """Give a module from the meta device fake weights on the CPU, in place; inside `dry_run`.

    Outside of `dry_run` timm cannot be built without either memory or the meta device; inside it, not at
    all, because it reads numbers back. And autocast knows only devices that compute.
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            fakes = {name: made.setdefault(id(x), _fake(x)) for name, x in tensors.items() if x is not None}
            tensors.update(fakes)  # type: ignore[arg-type]


def _fake(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return (
        nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    )
