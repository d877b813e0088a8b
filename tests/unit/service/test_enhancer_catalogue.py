import json
from pathlib import Path
from typing import Any

import pytest
import timm

from cim_core.config import EnhancerConfig
from cim_core.models.enhancer import Enhancer
from scripts.list_enhancers import TARGET, describe


def catalogue() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(Path(TARGET).read_text(encoding="utf-8"))
    return entries


def test_catalogue__names_every_network_of_the_pinned_timm() -> None:
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if f"timm=={timm.__version__}" not in pins:
        pytest.skip(f"enhancers.json belongs to the pinned timm, installed is {timm.__version__}")
    names = list(catalogue())
    assert names == sorted(names)
    assert set(names) == set(timm.list_models())


def test_catalogue__is_compact() -> None:
    assert TARGET.stat().st_size < 400_000


def test_catalogue__an_entry_that_cannot_serve_says_why_and_most_can() -> None:
    entries = catalogue()
    refused = [entry for entry in entries.values() if not entry["ok"]]
    assert all(entry["why"] for entry in refused)
    assert len(refused) < 0.1 * len(entries)


def test_catalogue__only_vits_share_and_they_have_all_sizes() -> None:
    for name, entry in catalogue().items():
        if entry.get("can_share"):
            assert entry["kind"] == "vit", name
            assert entry["width"] % entry["heads"] == 0, name
            assert entry["depth"] >= 1, name


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "resnet18", "convnext_atto", "beit_base_patch16_224"],
)
def test_catalogue__agrees_with_an_enhancer_that_is_built(name: str) -> None:
    entry = catalogue()[name]
    enhancer = Enhancer(EnhancerConfig(name=name), image_size=entry["input_size"], patch_size=16)
    assert entry["ok"]
    assert entry["width"] == enhancer.width == enhancer.backbone.num_features
    assert (entry["kind"] == "vit") is enhancer.is_vit
    assert entry.get("can_share", False) is enhancer.can_share
    if enhancer.is_vit:
        assert entry["depth"] == len(enhancer.backbone.blocks)  # type: ignore[arg-type]
        assert entry["heads"] == enhancer.backbone.blocks[0].attn.num_heads  # type: ignore[index, union-attr]


def test_catalogue__most_networks_can_be_recomputed() -> None:
    serving = {name: entry for name, entry in catalogue().items() if entry["ok"]}
    without = {name for name, entry in serving.items() if not entry["can_checkpoint"]}
    assert {"dla34", "convit_tiny", "hrnet_w18"} <= without
    assert not {"vit_small_patch16_224", "resnet50", "swin_tiny_patch4_window7_224"} & without
    assert len(without) < 0.1 * len(serving)


@pytest.mark.parametrize(
    "name",
    [
        "vgg11",
        "cait_xxs24_224",
        "test_vit",
        "mobilenetv3_small_050",
        "convit_tiny",
        "resnet18",
        "skresnet18",
        "dla34",
    ],
)
def test_catalogue__is_what_the_script_writes(name: str) -> None:
    assert catalogue()[name] == describe(name)
