"""Small specs on the bundled photographs, as a user would write them."""

from pathlib import Path
from typing import Any

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"
TRAIN_TAR = PHOTOS / "train.tar"
VAL_TAR = PHOTOS / "val.tar"

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "shared_blocks": 1,
    "options": {"depth": 3, "embed_dim": 64, "num_heads": 2},
}
RESNET: dict[str, Any] = {"name": "resnet10t"}


def training(steps: int, **changes: Any) -> dict[str, Any]:
    """A short training in fp32, which is what two CPU cores do best at this size."""
    return {
        "steps": steps,
        "batch_size": 16,
        "precision": "fp32",
        "checkpoint_every": {"steps": 10},
        "sample_every": {"steps": steps},
        "log_every": 5,
        "crop_min": 0.5,
        **changes,
    }


def tokenizer(name: str, *, steps: int = 40, **changes: Any) -> dict[str, Any]:
    """A tokenizer of 64 codes."""
    return {
        "kind": "tokenizer",
        "name": name,
        "data": {"uri": str(TRAIN_TAR)},
        "model": {"image_size": 64, "width": 16, "vocab_size": 64, "code_dim": 16},
        "training": training(steps, learning_rate=2e-3),
        **changes,
    }


def pretrain(
    name: str,
    tokenizer_source: str,
    *,
    enhancer: dict[str, Any],
    objective: str,
    steps: int = 20,
    **changes: Any,
) -> dict[str, Any]:
    """A pre-training at 64 pixels on an 8 x 8 grid."""
    return {
        "kind": "pretrain",
        "name": name,
        "data": {"uri": str(TRAIN_TAR)},
        "model": {
            "image_size": 64,
            "patch_size": 8,
            "tokenizer": {"source": tokenizer_source},
            "generator": {"depth": 2, "width": 64, "heads": 2},
            "enhancer": enhancer,
            "objective": {"name": objective},
        },
        "training": training(steps),
        **changes,
    }


def pretrain_mae(name: str, *, steps: int = 20, **changes: Any) -> dict[str, Any]:
    """The same by a peer of CIM that needs no tokenizer."""
    return {
        "kind": "pretrain",
        "name": name,
        "data": {"uri": str(TRAIN_TAR)},
        "model": {
            "method": "mae",
            "image_size": 64,
            "patch_size": 8,
            "enhancer": {key: VIT[key] for key in ("name", "options")},
            "decoder": {"depth": 1, "width": 64, "heads": 2},
        },
        "training": training(steps),
        **changes,
    }


def evaluate(name: str, encoder: str) -> dict[str, Any]:
    """A k-NN evaluation on the bundled labelled tiles."""
    return {
        "kind": "evaluate",
        "name": name,
        "encoder": encoder,
        "data": {"train": str(TRAIN_TAR), "val": str(VAL_TAR)},
        "tasks": ["knn"],
    }
