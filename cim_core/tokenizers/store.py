"""A trained tokenizer as a folder: `model.safetensors` and `config.json`; nothing is pickled."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cim_core.config import TokenizerConfig
from cim_core.errors import ModelError
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dvae import DiscreteVAE

TENSORS, RECORD = "model.safetensors", "config.json"
FORMAT, KIND = 1, "dvae"


def save_tokenizer(model: DiscreteVAE, folder: Path) -> None:
    """Write `model` into `folder`, made where missing; OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _portable(tensor) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / TENSORS)
    record = {"format": FORMAT, "kind": KIND, "config": asdict(model.config)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, frozen, in eval mode, on the CPU.

    Raises:
        ModelError: a file is missing or broken, or the weights do not fit the configuration.
    """
    model = DiscreteVAE(_read_config(folder), generator=torch.Generator())
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(_lesson(folder, f"{TENSORS} cannot be read ({error})")) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        listed = " ".join(str(error).split())
        raise ModelError(_lesson(folder, f"the weights do not fit {RECORD}: {listed}")) from error
    return model.eval().requires_grad_(requires_grad=False)


def _read_config(folder: Path) -> TokenizerConfig:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(_lesson(folder, f"{RECORD} cannot be read ({error})")) from error
    if not isinstance(record, dict) or (record.get("format"), record.get("kind")) != (FORMAT, KIND):
        raise ModelError(_lesson(folder, f"{RECORD} does not say format {FORMAT} and kind {KIND!r}"))
    # A newer release may have written keys that this one does not know; the weights decide.
    known = {field.name for field in fields(TokenizerConfig)}
    saved: dict[str, Any] = {key: value for key, value in record["config"].items() if key in known}
    try:
        return TokenizerConfig(**saved)
    except (TypeError, ValueError) as error:
        raise ModelError(_lesson(folder, f"its configuration is not valid: {error}")) from error


def _lesson(folder: Path, what: str) -> str:
    return (
        f"{folder} holds no usable tokenizer: {what}. "
        "Point the source at the `tokenizer` folder of a tokenizer job that succeeded"
    )


def _portable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own on the CPU in plain order, which is all that safetensors takes."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
