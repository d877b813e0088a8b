"""Write service/contracts/enhancers.json: what each timm network is, and whether it can be an enhancer.

Run it after raising the timm version: `python -m scripts.list_enhancers`. It takes about half an hour
on one core; no weights are made and nothing is downloaded.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

from cim_core.errors import ModelError
from cim_core.models.probe import build_on_meta, plan_backbone

TARGET = Path(__file__).parents[1] / "service" / "contracts" / "enhancers.json"
_MAX_WHY = 160


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
    if plan.is_vit:
        entry |= {"heads": plan.heads, "depth": plan.depth, "patch": plan.patch, "can_share": plan.can_share}
    return {key: value for key, value in entry.items() if value is not None}


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


def main() -> None:
    """Describe every network and write them all, one a line, sorted."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines = []
    for name in sorted(timm.list_models()):
        lines.append(f"{json.dumps(name)}:{json.dumps(describe(name), separators=(',', ':'))}")
        print(lines[-1], flush=True)
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
