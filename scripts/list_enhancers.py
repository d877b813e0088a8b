"""Write service/contracts/enhancers.json: what each timm network is, and whether it can be an enhancer.

Run it after raising the timm version: `python -m scripts.list_enhancers`. It takes about half an hour
of one core; no weights are made and nothing is downloaded. `--missing` goes on where a run was cut.
"""

import argparse
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
    entry["can_checkpoint"] = plan.can_checkpoint
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
