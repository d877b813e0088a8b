"""Between host and device without waiting: a GPU works on what is queued while the host goes on.

A copy waits unless the host's side is page-locked; reading a number waits for all that was queued before.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch of tensors."""

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`, copied on the current stream."""

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory, once released, until `stream` is done with what it was given till then."""


BatchT = TypeVar("BatchT", bound=Movable)


def on_device(batches: Iterable[BatchT], device: torch.device) -> Iterator[BatchT]:
    """Each batch on `device`; a GPU copies it beside the step before, which is still at work."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        # The memory belongs to the stream of the copies, which would else use it again at once.
        moved.hold(current)
        yield moved


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which lies on the CPU, on `device`."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Copies:
    """Tensors by name on their way to the CPU, where each gets contiguous memory of its own.

    What is queued on the device after them may overwrite the originals.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: _host_copy(x) for name, x in tensors.items()}
        self._arrival = _arrival(any(x.is_cuda for x in tensors.values()))

    def wait(self) -> dict[str, Tensor]:
        """The copies, once they are here; any thread may wait for them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies


class Readback:
    """Numbers [K] of a device on their way to the host."""

    def __init__(self, numbers_K: Tensor) -> None:
        # Without blocking, torch copies from a GPU into page-locked memory, which it makes for it.
        self._host_K = numbers_K.detach().to("cpu", non_blocking=True)
        self._arrival = _arrival(numbers_K.is_cuda)

    @property
    def at_hand(self) -> bool:
        """Whether `values` answers at once on every device of this kind, and so on all ranks alike."""
        return self._arrival is None

    def values(self) -> list[float]:
        """The numbers; waits until they are here, but for nothing that was queued after them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        values: list[float] = self._host_K.tolist()
        return values


def _host_copy(x: Tensor) -> Tensor:
    # As in `Readback`; the other kinds of devices promise nothing of a copy that does not block.
    return x.detach().to("cpu", copy=True, non_blocking=x.is_cuda, memory_format=torch.contiguous_format)


def _arrival(from_gpu: bool) -> torch.cuda.Event | None:  # noqa: FBT001
    """An event behind all that a GPU was given so far; None where nothing is to be waited for."""
    if not from_gpu:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
