"""Files as OpenAI wrote theirs: the package's own modules, random and small, pickled as wholes."""

from pathlib import Path
from typing import Any

import pytest
import torch

dall_e = pytest.importorskip("dall_e", reason="the package DALL-E is the oracle here: a dev dependency")

WIDTH, BLOCKS, VOCAB, CODE = 16, 2, 48, 12


def official_encoder(**sizes: Any) -> Any:
    """The official encoder with random weights and biases; its tokens differ between pictures."""
    return _random(
        dall_e.Encoder(**{"n_hid": WIDTH, "n_blk_per_group": BLOCKS, "vocab_size": VOCAB, **sizes})
    )


def official_decoder(**sizes: Any) -> Any:
    """The official decoder with random weights and biases."""
    fixed = {"n_hid": WIDTH, "n_blk_per_group": BLOCKS, "vocab_size": VOCAB, "n_init": CODE}
    return _random(dall_e.Decoder(**{**fixed, **sizes}))


def write_official(
    folder: Path, *, encoder: Any = None, decoder: Any = None, zipped: bool = True
) -> tuple[Path, Path]:
    """`encoder.pkl` and `decoder.pkl` in `folder`, in the zip format or the older one."""
    paths = folder / "encoder.pkl", folder / "decoder.pkl"
    for path, module in zip(
        paths, (encoder or official_encoder(), decoder or official_decoder()), strict=True
    ):
        torch.save(module, path, _use_new_zipfile_serialization=zipped)
    return paths


def _random(module: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim == 4 else 25
        parameter.data = torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5
    return module.requires_grad_(requires_grad=False)
