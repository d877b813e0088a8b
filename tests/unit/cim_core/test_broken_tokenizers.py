"""Folders of tokenizers that were damaged or made up: each is refused with a sentence, none costs memory."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cim_core.errors import ModelError
from cim_core.tokenizers.store import load_tokenizer
from tests.unit.cim_core.test_tokenizer_store import official, saved

MAKE: dict[str, Callable[[Path], object]] = {"dvae": saved, "dall-e": official}
Header = dict[str, Any]


def made(kind: str, folder: Path) -> Path:
    MAKE[kind](folder)
    return folder


def with_header(folder: Path, change: Callable[[Header], Header | bytes]) -> None:
    """Change what model.safetensors says of its tensors, and leave the numbers."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    new = change(json.loads(data[8 : 8 + length]))
    header = new if isinstance(new, bytes) else json.dumps(new).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def first_says(**claims: Any) -> Callable[[Header], Header]:
    """A header that claims this of its first tensor."""

    def change(header: Header) -> Header:
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], **claims}}

    return change


LIES: dict[str, Callable[[Header], Header | bytes]] = {
    "a larger shape": first_says(shape=[2**62, 2**62]),
    "no shape": first_says(shape=[0]),
    "a negative shape": first_says(shape=[-1]),
    "halves": first_says(dtype="F16"),
    "four bits": first_says(dtype="F4"),
    "no type": first_says(dtype="X"),
    "beyond the end": first_says(data_offsets=[0, 2**63]),
    "backwards": first_says(data_offsets=[8, 0]),
    "no tensor": lambda _: {},
    "a list": lambda _: b"[]",
    "nesting without end": lambda _: b'{"a":' * 10_000,
    "an infinity": lambda header: json.dumps(header).replace("[0", "[1e999", 1).encode(),
    "no UTF-8": lambda _: b'{"\xff": 1}',
}
CONFIGS = {
    "no JSON": b"hello",
    "a list": b"[]",
    "nested objects": b'{"a":' * 10_000,
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "no UTF-8": b"\xff\xfe\x00",
    "too many digits": b'{"format": ' + b"1" * 5000 + b"}",
}
VALUES = ["1e999", "-1e999", "NaN", '"x"', "null", "[]", "{}", "-5", "0", "1e3", "4.0", "1000000000"]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", MAKE)
def test_load__a_header_that_lies(tmp_path: Path, kind: str, lie: str) -> None:
    with_header(made(kind, tmp_path), LIES[lie])
    with pytest.raises(ModelError, match=r"holds no usable tokenizer: .*Point the source at"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", CONFIGS)
@pytest.mark.parametrize("kind", MAKE)
def test_load__a_configuration_that_is_none(tmp_path: Path, kind: str, content: str) -> None:
    (made(kind, tmp_path) / "config.json").write_bytes(CONFIGS[content])
    with pytest.raises(ModelError, match=r"config\.json cannot be read|config\.json does not say"):
        load_tokenizer(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, key) for kind in MAKE for key in ("width", "vocab_size", "code_dim", "blocks_per_group")),
        ("dvae", "stride"),
        ("dvae", "quantiser"),
    ],
)
def test_load__a_size_that_is_none(tmp_path: Path, kind: str, key: str, value: str) -> None:
    """A thousand million of anything fits no weights; finding that out must not take their memory."""
    record = json.loads((made(kind, tmp_path) / "config.json").read_text())
    record["config"][key] = "here"
    (tmp_path / "config.json").write_text(json.dumps(record).replace('"here"', value))
    with pytest.raises(ModelError, match=r"configuration is not valid|weights do not fit"):
        load_tokenizer(tmp_path)


def test_load__makes_no_weights_but_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("memory was taken for weights that a folder may only claim to have")

    made("dvae", tmp_path)
    monkeypatch.setattr("cim_core.tokenizers.dvae.initialise", refuse)
    assert load_tokenizer(tmp_path).vocab_size == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MAKE)
def test_load__weights_of_another_precision_become_those_of_the_network(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    tensors = load_file(made(kind, tmp_path) / "model.safetensors")
    changed = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(changed, tmp_path / "model.safetensors")
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode(torch.rand(1, 3, 16, 16))
    assert loaded.decode(ids).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@pytest.mark.parametrize("kind", MAKE)
def test_load__weights_that_are_no_real_numbers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = load_file(made(kind, tmp_path) / "model.safetensors")
    save_file({name: x.to(dtype) for name, x in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights do not fit config\.json: .* holds"):
        load_tokenizer(tmp_path)
