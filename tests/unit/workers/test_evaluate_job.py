import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cim_core.errors import ModelError
from service.contracts.jobs import FailureKind
from service.contracts.specs import Knn
from workers.evaluate_job import input_side, load_encoder, metric_name, random_encoder
from workers.failures import classify

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


def encoder_folder(folder: Path, **changes: Any) -> Path:
    """An encoder that serves, its config.json changed."""
    config = json.loads(CONFIG) | changes
    (folder / "config.json").write_text(json.dumps(config))
    network = timm.create_model("resnet18", num_classes=0)
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def refusal(folder: Path) -> str:
    """What a job with this encoder ends with, which is the user's to mend."""
    with pytest.raises(ModelError, match="point it at the `encoder` folder of a pretrain job") as caught:
        load_encoder(folder)
    assert classify(caught.value, store_url="/store").kind is FailureKind.USER
    return str(caught.value)


def test_load_encoder__one_that_serves(tmp_path: Path) -> None:
    assert input_side(load_encoder(encoder_folder(tmp_path))) == 32


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"[]",
        b"{}",
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b'{"architecture": 5}',
        b'{"architecture": "no"}',
    ],
    ids=["text", "list", "empty", "nested", "no UTF-8", "number", "unknown"],
)
def test_load_encoder__a_config_that_is_none(tmp_path: Path, content: bytes) -> None:
    (encoder_folder(tmp_path) / "config.json").write_bytes(content)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "size",
    [
        [3, math.inf, math.inf],
        [3, 32, -1],
        [3, 32, 0],
        [3, 32, 10**9],
        [3, 32, 32.5],
        [3, 32, "32"],
    ],
    ids=str,
)
def test_load_encoder__an_input_size_that_is_none(tmp_path: Path, size: object) -> None:
    told = refusal(encoder_folder(tmp_path, pretrained_cfg={"input_size": size, "num_classes": 0}))
    assert "must be 1 to 16384 pixels" in told


@pytest.mark.parametrize("size", [[], 5], ids=str)
def test_load_encoder__an_input_size_of_another_form(tmp_path: Path, size: object) -> None:
    refusal(encoder_folder(tmp_path, pretrained_cfg={"input_size": size, "num_classes": 0}))


def test_load_encoder__pictures_of_another_size_than_the_network_takes(tmp_path: Path) -> None:
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 160}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments}
    config |= {"pretrained_cfg": {"input_size": [3, 96, 96]}}
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Input height (96) doesn't match model (160)" in refusal(tmp_path)


def test_load_encoder__a_network_that_makes_no_vector(tmp_path: Path) -> None:
    told = refusal(encoder_folder(tmp_path, global_pool="", model_args={"global_pool": ""}))
    assert "no vector" in told


def test_load_encoder__sizes_that_the_weights_cannot_fill_cost_no_memory(tmp_path: Path) -> None:
    config = {
        "architecture": "test_vit",
        "num_classes": 0,
        "model_args": {"embed_dim": 64 * 10**4, "num_heads": 2},
    }
    encoder_folder(tmp_path, **config)
    assert "weights" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{", b'{"a":' * 10_000, b"\xff", b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'],
)
def test_load_encoder__weights_whose_header_lies(tmp_path: Path, header: bytes) -> None:
    encoder_folder(tmp_path)
    for length in (len(header), 2**63):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header)
        refusal(tmp_path)


def test_random_encoder__is_a_function_of_the_seed_and_leaves_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    before = torch.random.get_rng_state()
    first, again, other = (next(random_encoder(tmp_path, seed=seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
