"""Batches on their way to a device: all of them, in order, none before its time, and errors with them.

The way to a GPU is walked on pretended streams, which write down what they are told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cim_core.data.dataset import Views
from cim_core.engine.transfer import on_device, send

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])


@dataclass
class Streams:
    """Two streams: of the copies, and the step's own."""

    current: str = "steps"
    story: list[str] = field(default_factory=list)


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: "Stream") -> None:
        self.streams.story.append(f"{self.name} waits for {other.name}")


@dataclass
class Batch:
    number: int
    streams: Streams
    place: str = "host"

    def to(self, device: torch.device) -> "Batch":
        self.streams.story.append(f"{self.streams.current} moves {self.number}")
        return Batch(self.number, self.streams, device.type)

    def hold(self, stream: object) -> None:
        assert isinstance(stream, Stream)
        self.streams.story.append(f"{stream.name} holds {self.number} on {self.place}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        before, made.current = made.current, stream.name
        yield
        made.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(made, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(made, made.current))
    return made


class Source:
    """Counts the batches that were asked for; the one after `last` is an error."""

    def __init__(self, streams: Streams, *, last: int) -> None:
        self.streams, self.last, self.asked = streams, last, 0

    def __iter__(self) -> Iterator[Batch]:
        while self.asked <= self.last:
            self.asked += 1
            yield Batch(self.asked - 1, self.streams)
        raise OSError("the disk is gone")


@DEVICES
def test_on_device__brings_every_batch_in_order(streams: Streams, device: torch.device) -> None:
    batches = [Batch(number, streams) for number in range(5)]
    moved = list(on_device(batches, device))
    assert [batch.number for batch in moved] == [0, 1, 2, 3, 4]
    assert {batch.place for batch in moved} == {"host" if device is CPU else "cuda"}


@DEVICES
def test_on_device__asks_for_a_batch_when_it_is_wanted_and_not_before(
    streams: Streams, device: torch.device
) -> None:
    source = Source(streams, last=9)
    moved = on_device(source, device)
    assert source.asked == 0
    for wanted in range(1, 5):
        next(moved)
        assert source.asked == wanted


@DEVICES
def test_on_device__lets_an_error_through_behind_the_batches_before_it(
    streams: Streams, device: torch.device
) -> None:
    moved = on_device(Source(streams, last=2), device)
    assert [batch.number for batch in islice(moved, 3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(moved)


def test_on_device__moves_nothing_on_a_cpu(streams: Streams) -> None:
    batches = [Batch(0, streams), Batch(1, streams)]
    assert all(a is b for a, b in zip(on_device(batches, CPU), batches, strict=True))
    assert streams.story == []


def test_on_device__copies_beside_the_step_which_waits_for_its_own_batch(streams: Streams) -> None:
    for batch in on_device([Batch(0, streams), Batch(1, streams)], GPU):
        streams.story.append(f"{streams.current} uses {batch.number}")
    assert streams.story == [
        line
        for number in (0, 1)
        for line in (
            f"copies moves {number}",
            "steps waits for copies",
            f"steps holds {number} on cuda",
            f"steps uses {number}",
        )
    ]


@pytest.fixture
def views() -> Views:
    return Views(
        pixels_B3HW=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        token_pixels_B3HW=torch.ones(2, 3, 4, 4, dtype=torch.uint8),
        ids_B2=torch.zeros(2, 2, dtype=torch.int64),
    )


def test_views__pin_and_hold_both_pictures_but_not_the_ids(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Tensor, object]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 100)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: held.append((tensor, stream)))
    pinned, stream = views.pin(), object()
    assert bool((pinned.pixels_B3HW == 100).all() and (pinned.token_pixels_B3HW == 101).all())
    assert pinned.ids_B2 is views.ids_B2
    views.hold(stream)  # type: ignore[arg-type]
    assert [stream for _, stream in held] == [stream, stream]
    assert {id(x) for x, _ in held} == {id(views.pixels_B3HW), id(views.token_pixels_B3HW)}


def test_views__go_to_a_device_without_their_ids(views: Views) -> None:
    moved = views.to(torch.device("meta"))
    assert (moved.pixels_B3HW.device.type, moved.token_pixels_B3HW.device.type) == ("meta", "meta")
    assert moved.ids_B2 is views.ids_B2


def test_send__goes_by_way_of_pinned_memory_to_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    x = torch.arange(3)
    assert send(x, CPU) is x
    assert pinned == []
    with FakeTensorMode():
        fake = torch.empty(3)
        assert send(fake, GPU).device == GPU
    assert [id(tensor) for tensor in pinned] == [id(fake)]
