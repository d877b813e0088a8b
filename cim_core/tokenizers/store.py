"""A tokenizer as a folder: `model.safetensors` and `config.json`; nothing is pickled.

There are two kinds: `dvae`, trained by a tokenizer job, and `dall-e`, converted from OpenAI's files.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cim_core.config import DALL_E, TokenizerConfig
from cim_core.errors import ModelError
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer, dalle_on_meta
from cim_core.tokenizers.dvae import DiscreteVAE

TENSORS, RECORD = "model.safetensors", "config.json"
FORMAT, KIND = 1, "dvae"

Stored = DiscreteVAE | DalleTokenizer


def save_tokenizer(model: Stored, folder: Path) -> None:
    """Write `model` into `folder`, made where missing; OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _portable(tensor) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / TENSORS)
    kind = {"kind": KIND}
    if isinstance(model, DalleTokenizer):
        kind = {"kind": DALL_E, **model.origin}
    record = {"format": FORMAT, **kind, "config": asdict(model.config)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, frozen, in eval mode, on the CPU.

    Raises:
        ModelError: a file is missing or broken, or the weights do not fit the configuration.
    """
    record = _read_record(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except Exception as error:  # of a damaged file, safetensors raises more than its own class
        raise ModelError(_lesson(folder, f"{TENSORS} cannot be read ({error})")) from error
    _check_blocks(folder, record["config"], num_tensors=len(tensors))
    try:
        # A newer release may have written keys that this one does not know; the weights decide.
        model = _BUILD[record["kind"]](record)
    except Exception as error:  # the sizes may be anything that JSON can say
        told = f"its configuration is not valid: {error or type(error).__name__}"
        raise ModelError(_lesson(folder, told)) from error
    try:
        model.load_state_dict(_fitting(tensors, model.state_dict()), assign=True)
    except (RuntimeError, TypeError) as error:
        listed = " ".join(str(error).split())
        raise ModelError(_lesson(folder, f"the weights do not fit {RECORD}: {listed}")) from error
    return model.eval().requires_grad_(requires_grad=False)


def _check_blocks(folder: Path, config: Mapping[str, Any], *, num_tensors: int) -> None:
    """Building layer after layer of a made-up depth would not end; each block has tensors."""
    blocks = config.get("blocks_per_group")
    if isinstance(blocks, int) and blocks > num_tensors:
        told = f"{num_tensors} tensors cannot be those of {blocks} blocks_per_group"
        raise ModelError(_lesson(folder, f"the weights do not fit {RECORD}: {told}"))


def _fitting(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the network's own precision. Raises TypeError where they are another kind of number."""
    for name, tensor in tensors.items():
        theirs = wanted.get(name, tensor)
        if tensor.dtype != theirs.dtype and not (tensor.is_floating_point() and theirs.is_floating_point()):
            raise TypeError(f"{name} holds {tensor.dtype}, and must hold {theirs.dtype}")
    return {name: tensor.to(wanted.get(name, tensor).dtype) for name, tensor in tensors.items()}


def _dvae(record: Mapping[str, Any]) -> DiscreteVAE:
    config = TokenizerConfig(**_known(TokenizerConfig, record))
    with torch.device("meta"):  # without memory: the file may lie about the sizes
        return DiscreteVAE(config, generator=torch.Generator(device="cpu"))


def _dalle(record: Mapping[str, Any]) -> DalleTokenizer:
    origin = {key: str(record[key]) for key in ("encoder_sha256", "decoder_sha256") if key in record}
    return dalle_on_meta(DalleConfig(**_known(DalleConfig, record)), origin=origin)


_BUILD: Mapping[str, Callable[[Mapping[str, Any]], Stored]] = MappingProxyType({KIND: _dvae, DALL_E: _dalle})


def _known(config: type[TokenizerConfig | DalleConfig], record: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    return {key: value for key, value in record["config"].items() if key in known}


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(_lesson(folder, f"{RECORD} cannot be read ({error})")) from error
    known = [{"format": FORMAT, "kind": kind} for kind in _BUILD]
    if not isinstance(record, dict) or {key: record.get(key) for key in ("format", "kind")} not in known:
        kinds = " or ".join(map(repr, _BUILD))
        raise ModelError(_lesson(folder, f"{RECORD} does not say format {FORMAT} and kind {kinds}"))
    if not isinstance(record.get("config"), dict):
        raise ModelError(_lesson(folder, f"{RECORD} holds no configuration"))
    return record


def _lesson(folder: Path, what: str) -> str:
    return (
        f"{folder} holds no usable tokenizer: {what}. "
        "Point the source at the `tokenizer` folder of a tokenizer job that succeeded"
    )


def _portable(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU in plain order, which is all that safetensors takes."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
