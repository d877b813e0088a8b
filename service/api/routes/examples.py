"""Specs that the API page offers to try. A test submits them."""

from typing import Any

from fastapi.openapi.models import Example

_TOKENIZER: dict[str, Any] = {
    "kind": "tokenizer",
    "name": "street-tokens",
    "data": {"uri": "/data/photos"},
    "model": {"vocab_size": 512},
    "training": {"epochs": 30, "batch_size": 32},
}
_PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "name": "street-vit-s",
    "data": {"uri": "/data/photos"},
    "model": {
        "image_size": 224,
        "patch_size": 16,
        "tokenizer": {"source": "job:street-tokens"},
        "enhancer": {"name": "vit_small_patch16_224"},
        "objective": {"name": "respix"},
    },
    "training": {"epochs": 300, "batch_size": 256},
    "labels": {"team": "vision"},
}
_EVALUATE: dict[str, Any] = {
    "kind": "evaluate",
    "name": "street-vit-s-knn",
    "encoder": "job:street-vit-s",
    "data": {"train": "/data/labelled/train", "val": "/data/labelled/val"},
    "tasks": [{"name": "knn", "k": 20}],
}

SPECS: dict[str, Example] = {
    "tokenizer": Example(summary="Train a tokenizer on your own images", value=_TOKENIZER),
    "three jobs": Example(
        summary="Tokenizer, encoder and its evaluation; each waits for the one before",
        value=[_TOKENIZER, _PRETRAIN, _EVALUATE],
    ),
}
