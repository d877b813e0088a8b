"""Both families and both objectives on real photographs, over REST, with two Ray workers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.embedded import Embedded, plain_timm, specs

TWO_WORKERS = {"workers": 2, "cpus_per_worker": 1}
CASES = [
    pytest.param(enhancer, objective, id=f"{family}-{objective}")
    for family, enhancer in (("vit", specs.VIT), ("resnet", specs.RESNET))
    for objective in ("respix", "revdet")
]

# What explains a run (docs/method.md).
COMMON = {"mim_loss", "mim_accuracy", "entropy", "replaced_share", "diag_feature_std", "diag_rankme"}
EXPLAINED = {
    "respix": COMMON | {"respix_error_replaced", "respix_error_kept"},
    "revdet": COMMON | {"revdet_balanced_accuracy", "revdet_auc"},
}
GRADIENTS = {"diag_gradient_generator", "diag_gradient_enhancer", "diag_gradient_cosine"}


@pytest.mark.slow
@pytest.mark.parametrize(("enhancer", "objective"), CASES)
def test_pretrain__two_workers_give_an_encoder_for_plain_timm(
    embedded: Embedded, tokenizer_name: str, tmp_path: Path, enhancer: dict[str, Any], objective: str
) -> None:
    name = f"two-{enhancer['name']}-{objective}"
    spec = specs.pretrain(name, f"job:{tokenizer_name}", enhancer=enhancer, objective=objective)
    (job,) = embedded.client.submit([{**spec, "resources": TWO_WORKERS}])
    job = embedded.finished(job.id)

    assert job.state == "succeeded", job.reason
    assert job.progress.step == job.progress.total_steps == 20
    assert job.result is not None
    paths = {entry.path for entry in embedded.client.artifacts(job.id)}
    assert {"encoder/model.safetensors", "encoder/config.json", "encoder/README.md"} <= paths
    assert {"spec.json", "data/report.json", "result.json", "samples/step-20.png"} <= paths
    assert any(path.startswith("attempts/1/checkpoints/step-20/") for path in paths)
    assert EXPLAINED[objective] <= set(job.metrics)
    assert (set(job.metrics) >= GRADIENTS) == (enhancer is specs.VIT), "a CNN shares no layer"

    embedded.client.download(job.id, "encoder", tmp_path)
    loaded = _load_with_plain_timm(tmp_path / "encoder")
    assert loaded["finite"]
    assert loaded["spread"] > 0


@pytest.mark.slow
def test_pretrain__a_peer_gives_one_too(embedded: Embedded, tmp_path: Path) -> None:
    labelled = {"train": str(specs.TRAIN_TAR), "val": str(specs.VAL_TAR), "every": {"steps": 20}}
    (job,) = embedded.client.submit([specs.pretrain_mae("peer-mae", probe=labelled)])
    job = embedded.finished(job.id)

    assert job.state == "succeeded", job.reason
    assert job.progress.step == 20
    assert {"mae_l2", "mask_share", "probe_knn_top1"} <= set(job.metrics)
    assert "mim_loss" not in job.metrics
    paths = {entry.path for entry in embedded.client.artifacts(job.id)}
    assert {"encoder/model.safetensors", "encoder/README.md", "samples/step-20.png"} <= paths

    embedded.client.download(job.id, "encoder", tmp_path)
    assert "Masked Autoencoder" in (tmp_path / "encoder" / "README.md").read_text(encoding="utf-8")
    loaded = _load_with_plain_timm(tmp_path / "encoder")
    assert loaded["finite"]
    assert loaded["spread"] > 0


def _load_with_plain_timm(folder: Path) -> dict[str, Any]:
    script = str(Path(plain_timm.__file__))
    command = [sys.executable, "-I", script, str(folder), "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
