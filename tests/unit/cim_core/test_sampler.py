from collections import Counter

import pytest
import torch

from cim_core.data.sampler import Stream, epoch_order
from cim_core.errors import ConfigError

Sample = tuple[int, int]


def naive_stream(num_images: int, seed: int, *, epochs: int) -> list[Sample]:
    """The slow oracle: all epochs written out one after another."""
    return [(e, i) for e in range(epochs) for i in epoch_order(num_images, seed, e).tolist()]


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (10, 10), (7, 3), (12, 6), (5, 1)])
def test_batches__are_the_stream_cut_in_equal_pieces(num_images: int, batch_size: int) -> None:
    stream = Stream(num_images=num_images, batch_size=batch_size, seed=3)
    steps = 4 * num_images // batch_size
    expected = naive_stream(num_images, 3, epochs=5)[: steps * batch_size]
    assert [tuple(s) for step in range(steps) for s in stream.batch(step)] == expected


def test_batches__any_step_alone_gives_what_it_gave_in_order() -> None:
    in_order = [Stream(num_images=10, batch_size=4, seed=0).batch(step) for step in range(30)]
    alone = [Stream(num_images=10, batch_size=4, seed=0).batch(step) for step in reversed(range(30))]
    assert in_order == alone[::-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks__together_are_the_batch_in_order(world_size: int) -> None:
    stream = Stream(num_images=10, batch_size=6, seed=0)
    for step in range(7):
        parts = [stream.batch(step, rank=r, world_size=world_size) for r in range(world_size)]
        assert [s for part in parts for s in part] == stream.batch(step)
        assert {len(part) for part in parts} == {6 // world_size}


def test_epochs__each_image_once_and_orders_differ() -> None:
    stream = Stream(num_images=50, batch_size=25, seed=0)
    seen = [s for step in range(4) for s in stream.batch(step)]
    assert Counter(seen) == {(e, i): 1 for e in range(2) for i in range(50)}
    assert [s.place for s in seen[:50]] != [s.place for s in seen[50:]]
    assert seen != [s for step in range(4) for s in Stream(num_images=50, batch_size=25, seed=1).batch(step)]


@pytest.mark.parametrize(("world_size", "fits"), [(3, 9), (4, 8), (11, 11)])
def test_share__batch_that_cannot_be_divided(world_size: int, fits: int) -> None:
    with pytest.raises(
        ConfigError, match=f"10 images cannot be divided equally among {world_size} parts.*use {fits}"
    ):
        Stream(num_images=10, batch_size=10, seed=0).batch(0, world_size=world_size)


def test_epoch_order__is_drawn_once_though_batches_lie_across_its_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shuffling a million places takes longer than a step, and each place is asked for by itself."""
    real, drawn = torch.randperm, []

    def shuffle(num_images: int, *, generator: torch.Generator) -> torch.Tensor:
        drawn.append(num_images)
        return real(num_images, generator=generator)

    monkeypatch.setattr(torch, "randperm", shuffle)
    epoch_order.cache_clear()
    stream = Stream(num_images=10, batch_size=4, seed=0)
    for step in (1, 2, 1, 2, 3):  # 2 has the last two of one epoch and the first two of the next
        stream.batch(step)
    assert drawn == [10, 10]
