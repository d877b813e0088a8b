import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cim_core.errors import DataError
from cim_core.evaluation import logistic
from cim_core.evaluation.logistic import fit_logistic, logistic_probe

CLASSES = 4


def features(count: int, seed: int, *, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    centres = 0.6 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    scales = torch.logspace(-2, 3, width)
    return 5 + scales * (centres[y] + torch.randn(count, width, generator=generator)), y


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("l2", [1.0, 0.01, 1e-4])
def test_fit__agrees_with_scikit_learn(l2: float) -> None:
    x, y = features(120, 1)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    oracle = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(scaled, y.numpy())
    ours = fit_logistic(torch.from_numpy(scaled), y, num_classes=CLASSES, l2=l2)
    # Only differences between classes count; scikit-learn's rows add up to zero, as ours do from zero.
    np.testing.assert_allclose(ours.weights_cd.numpy(), oracle.coef_, rtol=5e-3, atol=1e-3)
    np.testing.assert_allclose(ours.bias_c.numpy(), oracle.intercept_, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("l2", [0.3, 0.003])
def test_probe__agrees_with_scikit_learn_at_one_strength(l2: float) -> None:
    (train_x, train_y), (val_x, val_y) = features(150, 1), features(200, 2)
    scaler = StandardScaler().fit(train_x.double().numpy())
    oracle = LogisticRegression(C=1 / (l2 * 150), tol=1e-8, max_iter=10_000)
    oracle.fit(scaler.transform(train_x.double().numpy()), train_y.numpy())
    expected = oracle.score(scaler.transform(val_x.double().numpy()), val_y.numpy())
    got = logistic_probe(
        train_x, train_y, val_x, val_y, num_classes=CLASSES, generator=rng(), strengths=(l2,)
    )
    assert got.accuracy == pytest.approx(expected)
    assert got.l2 == l2
    assert 0.4 < expected < 0.99, "a trivial case would prove nothing"


def test_probe__strength_is_chosen_without_the_validation_set() -> None:
    """Wrong validation labels change the accuracy, but not the strength."""
    (train_x, train_y), (val_x, val_y) = features(60, 1, width=40), features(200, 2, width=40)
    right = logistic_probe(train_x, train_y, val_x, val_y, num_classes=CLASSES, generator=rng())
    wrong = logistic_probe(
        train_x, train_y, val_x, (val_y + 1) % CLASSES, num_classes=CLASSES, generator=rng()
    )
    assert right.l2 == wrong.l2
    assert right.accuracy > wrong.accuracy


@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])  # the middle, the weakest and the strongest win
def test_probe__strength_is_the_best_on_the_part_held_out(noise: float) -> None:
    y = torch.arange(120) % CLASSES
    x = torch.nn.functional.one_hot(y, CLASSES).repeat(1, 10) + noise * torch.randn(120, 40, generator=rng())
    strengths = (10.0, 0.1, 1e-3)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    held, kept = (part.numpy() for part in torch.split(torch.randperm(120, generator=rng()), [24, 96]))
    scores = []
    for l2 in strengths:
        oracle = LogisticRegression(C=1 / (l2 * 96), tol=1e-8, max_iter=10_000)
        scores.append(oracle.fit(scaled[kept], y[kept].numpy()).score(scaled[held], y[held].numpy()))
    got = logistic_probe(x, y, x, y, num_classes=CLASSES, generator=rng(), strengths=strengths)
    assert got.l2 == strengths[int(np.argmax(scores))]


def test_probe__a_constant_feature_does_no_harm() -> None:
    x, y = features(100, 1)
    x[:, 3] = 7.0
    got = logistic_probe(x, y, x, y, num_classes=CLASSES, generator=rng())
    assert got.accuracy > 0.5


def test_probe__too_few_images() -> None:
    x, y = features(4, 0)
    with pytest.raises(DataError, match="at least 5 training images and 1 to classify, got 4 and 4"):
        logistic_probe(x, y, x, y, num_classes=CLASSES, generator=rng())
    x, y = features(20, 0)
    with pytest.raises(DataError, match="got 20 and 0"):
        logistic_probe(x, y, x[:0], y[:0], num_classes=CLASSES, generator=rng())


def test_probe__refits_on_all_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = fit_logistic

    def watched(x_Td: Tensor, y_T: Tensor, *, num_classes: int, l2: float) -> logistic.LinearLayer:
        seen.append(len(x_Td))
        return original(x_Td, y_T, num_classes=num_classes, l2=l2)

    monkeypatch.setattr(logistic, "fit_logistic", watched)
    x, y = features(50, 1)
    logistic_probe(x, y, x, y, num_classes=CLASSES, generator=rng(), strengths=(1.0, 0.1))
    assert seen == [40, 40, 50]
