from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import scan
from cim_core.errors import DataError
from cim_core.evaluation.features import extract, normalise, rank_slice
from tests.unit.cim_core.tiny import CPU, write_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = write_images(tmp_path_factory.mktemp("images"), count=7, side=40)
    return ImageDataset(scan(folder), ViewConfig(image_size=32))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=32, num_classes=0)
    return model


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_extract__equals_timm_called_by_hand(name: str, dataset: ImageDataset) -> None:
    """`num_classes=0` makes timm's own forward return the pooled features."""
    options = {"img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    images = torch.stack([dataset.eval_image(place) for place in range(7)]).double().div(255)
    images = ((images - mean[:, None, None]) / std[:, None, None]).float()
    with torch.no_grad():
        expected = model(images)
    features, labels = extract(model, dataset, batch_size=3, device=CPU)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [e.label for e in dataset.index.entries] == [0, 0, 0, 0, 1, 1, 1]
    assert not features.requires_grad


def test_extract__training_mode_and_batch_statistics_come_back(dataset: ImageDataset) -> None:
    model = timm.create_model("test_resnet", num_classes=0).train()
    model.layer1.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    extract(model, dataset, batch_size=4, device=CPU)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_extract__modes_come_back_after_an_error(dataset: ImageDataset) -> None:
    class Failing(nn.Module):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        extract(model, dataset, batch_size=4, device=CPU)
    assert model.training


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_extract__slices_of_the_ranks_make_the_whole(
    world_size: int, dataset: ImageDataset, vit: nn.Module
) -> None:
    whole, labels = extract(vit, dataset, batch_size=7, device=CPU)
    parts = [
        extract(vit, dataset, batch_size=7, device=CPU, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    torch.testing.assert_close(torch.cat([x for x, _ in parts]), whole, rtol=1e-4, atol=1e-5)
    assert torch.cat([y for _, y in parts]).tolist() == labels.tolist()


def test_rank_slice__differ_by_one_at_most() -> None:
    sizes = [len(rank_slice(10, rank=r, world_size=4)) for r in range(4)]
    assert (sum(sizes), max(sizes) - min(sizes)) == (10, 1)


def test_extract__without_labels(tmp_path: Path, vit: nn.Module) -> None:
    write_images(tmp_path / "a" / "b", count=2)
    with pytest.raises(DataError, match="has no labels"):
        extract(vit, ImageDataset(scan(tmp_path), ViewConfig(image_size=32)), batch_size=2, device=CPU)


def test_normalise__grey_by_hand() -> None:
    grey = normalise(torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)).flatten()
    assert grey.tolist() == pytest.approx(
        [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    )
