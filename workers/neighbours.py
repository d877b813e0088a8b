"""k-NN accuracy over all ranks: each extracts features of its share, then all hold all of them.

Shape letters in this file:
    S  images of one set over all ranks      d  feature width
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import Index
from cim_core.engine.dist import gather_rows
from cim_core.evaluation.features import extract
from cim_core.evaluation.knn import weighted_knn
from workers.data import index_of
from workers.rank import Rank


class WatchedDataset(ImageDataset):
    """A data set that tells of every image it reads: hours of extraction must not look like a hang."""

    def __init__(self, index: Index, views: ViewConfig, *, on_image: Callable[[], None]) -> None:
        super().__init__(index, views)
        self._on_image = on_image

    def eval_image(self, place: int) -> Tensor:
        """As the base class says."""
        self._on_image()
        return super().eval_image(place)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of two labelled sets: features [S, d] float32 and classes [S] int64, on the rank's device."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Two labelled sets of the same classes."""

    train: ImageDataset
    val: ImageDataset

    @classmethod
    def of(cls, rank: Rank, *, train: str, val: str, image_size: int) -> "Labelled":
        """The sets that the driver found under these roles."""
        views = ViewConfig(image_size=image_size)
        return cls(
            train=WatchedDataset(index_of(rank, train), views, on_image=rank.reporter.alive),
            val=WatchedDataset(index_of(rank, val), views, on_image=rank.reporter.alive),
        )

    def features(self, rank: Rank, encoder: nn.Module, *, batch_size: int) -> Features:
        """Pooled features of both sets; collective, all ranks get all of them."""
        return Features(
            train=_gathered(rank, encoder, self.train, batch_size=batch_size),
            val=_gathered(rank, encoder, self.val, batch_size=batch_size),
            num_classes=len(self.train.index.classes),
        )


def measure(features: Features, *, k: int, temperature: float) -> float:
    """Share of the validation images, 0 to 1, that their neighbours name rightly."""
    return weighted_knn(
        *features.train, *features.val, k=k, temperature=temperature, num_classes=features.num_classes
    )


def _gathered(
    rank: Rank, encoder: nn.Module, dataset: ImageDataset, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    # Fewer images than ranks would leave a rank without a row, whose width nobody knows.
    alone = len(dataset) < rank.world_size
    share = {"rank": 0, "world_size": 1} if alone else {"rank": rank.number, "world_size": rank.world_size}
    x, y = extract(encoder, dataset, batch_size=batch_size, device=rank.device, **share)
    x, y = x.to(rank.device), y.to(rank.device)
    return (x, y) if alone else (gather_rows(x), gather_rows(y))
