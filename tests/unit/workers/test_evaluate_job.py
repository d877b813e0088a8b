from pathlib import Path

import pytest
import torch

from cim_core.errors import ModelError
from service.contracts.specs import Knn
from workers.evaluate_job import load_encoder, metric_name, random_encoder

CONFIG = (
    '{"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 32, 32], '
    '"num_classes": 0, "classifier": null, "first_conv": null}}'
)


def row(encoder: str, *, k: int = 20) -> dict[str, object]:
    return {"encoder": encoder, "task": "knn", "metric": "top1", "k": k, "temperature": 0.07}


def test_metric_name__the_encoder_and_the_random_one() -> None:
    assert metric_name(row("cim"), [Knn()]) == "knn_top1"
    assert metric_name(row("random"), [Knn()]) == "knn_top1_random"


def test_metric_name__two_tasks_do_not_overwrite_each_other() -> None:
    tasks = [Knn(k=5), Knn(k=20)]
    assert metric_name(row("cim", k=5), tasks) == "knn_k5_t0.07_top1"
    assert metric_name(row("random", k=20), tasks) == "knn_k20_t0.07_top1_random"


def test_load_encoder__a_folder_without_one_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="point it at the `encoder` folder of a pretrain job"):
        load_encoder(tmp_path)


def test_random_encoder__is_a_function_of_the_seed_and_leaves_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    before = torch.random.get_rng_state()
    first, again, other = (next(random_encoder(tmp_path, seed=seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
