"""Write service/contracts/enhancers.json: what each timm network is, and whether it can be an enhancer.

Run it after raising the timm version: `python -m scripts.list_enhancers`. It takes about an hour
of one core; no weights are made and nothing is downloaded. `--missing` goes on where a run was cut.

Of a network with batch norm, `one_image_from` is the least image side, in pixels, from which a training
pass may hold a single image (null: none does), and `one_image_from_by_stride` the same by output_stride.
"""

import argparse
import json
import logging
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from cim_core.errors import ModelError
from cim_core.models.probe import BackbonePlan, build_on_meta, plan_backbone, trains_on_one_image

TARGET = Path(__file__).parents[1] / "service" / "contracts" / "enhancers.json"
_MAX_WHY = 160
_COARSE = 32  # pixels; the strides of most networks
_OUTPUT_STRIDES = (8, 16)  # what CNNs of timm take beside 32, which is their own


def describe(name: str) -> dict[str, Any]:
    """The entry of one network at the input size that timm gives as its default."""
    size = default_size(name)
    try:
        plan = plan_backbone(name, image_size=size)
    except ModelError as error:
        why = str(error).removeprefix(f"enhancer.name: {name} ")
        entry = {"kind": "map", "width": default_width(name), "input_size": size, "ok": False}
        return {**entry, "why": why[:_MAX_WHY]}
    entry = {"kind": "vit" if plan.is_vit else "map", "width": plan.width, "input_size": size, "ok": True}
    entry["can_checkpoint"] = plan.can_checkpoint
    if plan.is_vit:
        entry |= {"heads": plan.heads, "depth": plan.depth, "patch": plan.patch, "can_share": plan.can_share}
    entry = {key: value for key, value in entry.items() if value is not None}
    return entry | _of_batch_norm(name, size) if _has_batch_norm(plan) else entry


def one_image_from(name: str, size: int, stride: int | None = None) -> int | None:
    """The least image side from which on one image can be trained on; None where none up to `2 * size` is.

    Where one image serves at some side, it serves at every larger one. Sides at which the network cannot be
    built are passed over. `stride` is the option output_stride; ModelError where the network has none.
    """
    whole = size // plan_backbone(name, image_size=size, options=_options(stride)).side
    if _serves_one(name, whole, stride) is False and _serves_one(name, whole + 1, stride):
        return whole + 1  # most networks: one position for each begun stride
    too_small = 0
    for side in (*range(_COARSE, size, _COARSE), size, 2 * size):
        served = _serves_one(name, side, stride)
        if served:
            return _least(name, too_small, side, stride)
        if served is False:
            too_small = side
    return None


def _least(name: str, low: int, high: int, stride: int | None) -> int:
    """The least side at which one image serves, where it does at `high`, and not at `low`."""
    least = high
    while high - low > 1:
        middle = (low + high) // 2
        sides = range(middle, high)
        side = next((side for side in sides if _serves_one(name, side, stride) is not None), None)
        if side is None:
            high = middle
        elif _serves_one(name, side, stride):
            least = high = side
        else:
            low = side
    return least


def _of_batch_norm(name: str, size: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"one_image_from": one_image_from(name, size)}
    by_stride = {}
    for stride in _OUTPUT_STRIDES:
        with suppress(ModelError):
            by_stride[str(stride)] = one_image_from(name, size, stride)
    return entry | ({"one_image_from_by_stride": by_stride} if by_stride else {})


def _has_batch_norm(plan: BackbonePlan) -> bool:
    layers = build_on_meta(plan.name, plan.train_args).modules()
    return any(isinstance(layer, _BatchNorm) for layer in layers)


def _options(stride: int | None) -> dict[str, int]:
    return {} if stride is None else {"output_stride": stride}


@lru_cache(maxsize=1000)
def _serves_one(name: str, size: int, stride: int | None) -> bool | None:
    """Whether one image can be trained on; None where the network cannot be built for this side."""
    try:
        plan = plan_backbone(name, image_size=size, options=_options(stride))
    except ModelError:
        return None
    return trains_on_one_image(plan, image_size=size)


def default_size(name: str) -> int:
    """Pixels a side that timm gives for `name`; 224 where it gives none."""
    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224


def default_width(name: str) -> int:
    """Feature channels of a network that cannot serve; 0 where it cannot even be built."""
    try:
        return int(getattr(build_on_meta(name, {"num_classes": 0}), "num_features", 0))
    except Exception:
        return 0


def save(entries: dict[str, dict[str, Any]]) -> None:
    """Write all entries, one a line, sorted."""
    lines = [
        f"{json.dumps(name)}:{json.dumps(entries[name], separators=(',', ':'))}" for name in sorted(entries)
    ]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Describe every network, or with --missing those that the file lacks; an interrupted run can go on."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--missing", action="store_true", help="keep the entries that are there")
    keep = parser.parse_args().missing and TARGET.exists()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    old: dict[str, dict[str, Any]] = json.loads(TARGET.read_text(encoding="utf-8")) if keep else {}
    known = timm.list_models()
    entries = {name: entry for name, entry in old.items() if name in known}
    for name in known:
        if name not in entries:
            entries[name] = describe(name)
            print(name, entries[name], flush=True)
            save(entries)


if __name__ == "__main__":
    main()
