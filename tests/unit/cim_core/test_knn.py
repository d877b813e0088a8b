import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from cim_core.errors import DataError
from cim_core.evaluation import knn
from cim_core.evaluation.knn import predict, weighted_knn

CLASSES = 4


def features(count: int, seed: int, *, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    centres = 0.7 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(count, width, generator=generator), y


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (200, 0.5)])
def test_predict__agrees_with_scikit_learn(k: int, temperature: float) -> None:
    (train_x, train_y), (val_x, val_y) = features(200, 1), features(150, 2)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    oracle.fit(train_x.numpy().astype(np.float64), train_y.numpy())
    expected = oracle.predict(val_x.numpy().astype(np.float64))
    ours = predict(train_x, train_y, val_x, k=k, temperature=temperature, num_classes=CLASSES)
    assert np.array_equal(ours.numpy(), expected)
    accuracy = weighted_knn(train_x, train_y, val_x, val_y, k=k, temperature=temperature, num_classes=CLASSES)
    assert accuracy == pytest.approx((expected == val_y.numpy()).mean())
    assert 0.3 < accuracy < 0.95, "a trivial case would prove nothing"


def test_predict__portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (train_x, train_y), (val_x, _) = features(100, 1), features(70, 2)
    whole = predict(train_x, train_y, val_x, k=7, temperature=0.07, num_classes=CLASSES)
    monkeypatch.setattr(knn, "PORTION", 9)
    assert torch.equal(predict(train_x, train_y, val_x, k=7, temperature=0.07, num_classes=CLASSES), whole)


def test_predict__a_low_temperature_does_not_overflow() -> None:
    """exp(1 / 0.001) is infinite in float32; the nearest neighbour then decides alone."""
    train_x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]])
    guess = predict(train_x, torch.tensor([2, 1, 1]), train_x[:1], k=3, temperature=0.001, num_classes=3)
    assert guess.tolist() == [2]


def test_predict__length_of_features_does_not_count() -> None:
    train_x = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    guess = predict(
        train_x, torch.tensor([0, 1]), torch.tensor([[0.1, 5.0]]), k=1, temperature=1, num_classes=2
    )
    assert guess.tolist() == [1]


def test_accuracy__more_neighbours_than_images() -> None:
    x, y = features(5, 0)
    with pytest.raises(DataError, match=r"k = 6 neighbours, but probe\.train has 5 images"):
        weighted_knn(x, y, x, y, k=6, num_classes=CLASSES)
    assert weighted_knn(x, y, x, y, k=1, num_classes=CLASSES) == 1.0


def test_accuracy__nothing_to_classify() -> None:
    x, y = features(5, 0)
    with pytest.raises(DataError, match=r"probe\.val"):
        weighted_knn(x, y, x[:0], y[:0], k=1, num_classes=CLASSES)
