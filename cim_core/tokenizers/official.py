"""OpenAI's `encoder.pkl` and `decoder.pkl`, whole pickled modules, into a `DalleTokenizer`.

The files are read as data (see `inert_pickle`): no class of the package `dall_e` is needed, and
nothing that a file asks for is executed. Every parameter must be there under its official name
and in the shape that follows from the module's own sizes, and nothing else.
"""

import hashlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cim_core.errors import ModelError
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer, dalle_on_meta
from cim_core.tokenizers.inert_pickle import Instance, RefusedPickleError, shown
from cim_core.tokenizers.torch_file import FLOAT_BYTES, TorchFile, attributes, open_torch_file

ENCODER, DECODER, CONV = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder", "dall_e.utils.Conv2d"
# Layers that have no parameters and whose work is known; ours does it at the same places.
BARE = frozenset(
    {
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.upsampling.Upsample",
    }
)
GROUPS = frozenset(
    {
        ENCODER,
        DECODER,
        "dall_e.encoder.EncoderBlock",
        "dall_e.decoder.DecoderBlock",
        "torch.nn.modules.container.Sequential",
    }
)
CLASSES = BARE | GROUPS | {CONV}

# The module's own names of our sizes, and the largest that are believed: no file may ask for more
# memory than it is worth.
SIZES = {"width": "n_hid", "blocks_per_group": "n_blk_per_group", "vocab_size": "vocab_size"}
DECODER_SIZES = {**SIZES, "code_dim": "n_init"}
MOST = {"n_hid": 4096, "n_blk_per_group": 16, "vocab_size": 1 << 17, "n_init": 4096}

Shape = tuple[int, ...]
# What is below a module: the shape of a parameter, or another such table for a module.
Tree = dict[str, Any]


def read_official(encoder: Path, decoder: Path) -> DalleTokenizer:
    """The tokenizer in OpenAI's two files, frozen, in eval mode, on the CPU.

    Raises:
        ModelError: a file is no such module, names anything unexpected, or is damaged; nothing of it
            was executed.
        OSError: a file cannot be read.
    """
    seen, weights = _read_encoder(encoder)
    config, decoder_weights = _read_decoder(decoder)
    if replace(seen, code_dim=config.code_dim) != config:
        raise ModelError(f"{encoder.name} and {decoder.name} do not belong together: {seen} and {config}")
    model = dalle_on_meta(
        config, origin={"encoder_sha256": sha256_of(encoder), "decoder_sha256": sha256_of(decoder)}
    )
    model.load_state_dict(weights | decoder_weights, assign=True)
    return model.requires_grad_(requires_grad=False)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_encoder(path: Path) -> tuple[DalleConfig, dict[str, Tensor]]:
    """Sizes (the code's apart) and weights under our names."""
    with _explained(path), open_torch_file(path, classes=CLASSES) as file:
        config = _config(file.root, ENCODER, SIZES)
        shapes = _official_shapes(dalle_on_meta(config, origin={}).encoder)
        found = _parameters(file, shapes, num_bytes=path.stat().st_size)
    return config, {f"encoder.{_our_name(name)}": tensor for name, tensor in found.items()}


def _read_decoder(path: Path) -> tuple[DalleConfig, dict[str, Tensor]]:
    """Sizes and weights under our names; the first convolution becomes the table."""
    with _explained(path), open_torch_file(path, classes=CLASSES) as file:
        config = _config(file.root, DECODER, DECODER_SIZES)
        shapes = _official_shapes(dalle_on_meta(config, origin={}).decoder)
        shapes["blocks.input.w"] = (config.code_dim, config.vocab_size, 1, 1)
        shapes["blocks.input.b"] = (config.code_dim,)
        found = _parameters(file, shapes, num_bytes=path.stat().st_size)
    table_DV = found.pop("blocks.input.w")[:, :, 0, 0]
    weights = {"table.weight": table_DV.t().contiguous(), "table.bias": found.pop("blocks.input.b")}
    return config, weights | {f"decoder.{_our_name(name)}": tensor for name, tensor in found.items()}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except RefusedPickleError as error:
        raise ModelError(
            f"{path.name} is not one of OpenAI's two files: {error}. It was read as data, nothing in it was "
            "executed. Fetch it again, and compare its SHA-256 with that of a file that you trust"
        ) from error


def _config(root: object, of: str, names: Mapping[str, str]) -> DalleConfig:
    """The sizes that the saved module itself says."""
    if not isinstance(root, Instance) or root.of != of:
        kind = root.of if isinstance(root, Instance) else shown(root)
        raise RefusedPickleError(f"it holds a {kind} where a {of} must be")
    state = attributes(root, of)
    sizes = {ours: state.get(theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        size = sizes[ours]
        if not isinstance(size, int) or not 1 <= size <= MOST[theirs]:
            raise RefusedPickleError(f"its {theirs} must be 1 to {MOST[theirs]}, got {shown(size)}")
    known: dict[str, Any] = sizes
    return DalleConfig(**known)


def _official_shapes(module: nn.Module) -> dict[str, Shape]:
    """Shapes by the names that the official code gives to our parameters."""
    renamed = {"weight": "w", "bias": "b"}
    return {
        f"{stem}.{renamed[last]}": tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        for stem, _, last in [name.rpartition(".")]
    }


def _our_name(official: str) -> str:
    stem, _, last = official.rpartition(".")
    return f"{stem}.{ {'w': 'weight', 'b': 'bias'}[last] }"


def _parameters(file: TorchFile, shapes: Mapping[str, Shape], *, num_bytes: int) -> dict[str, Tensor]:
    """Exactly the parameters of `shapes`, from a file of that size."""
    needed = sum(prod(shape) for shape in shapes.values()) * FLOAT_BYTES
    if needed > num_bytes:
        raise RefusedPickleError(f"its sizes need {needed} bytes of weights, and the file has {num_bytes}")
    tree: Tree = {}
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = shape
    return dict(_below(file, file.root, tree, path=""))


def _below(file: TorchFile, module: object, tree: Tree, *, path: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a saved module by their dotted names. The tree leads, so no cycle can trap it."""
    own = {name: shape for name, shape in tree.items() if isinstance(shape, tuple)}
    saved, children = _table(module, "_parameters", path), _table(module, "_modules", path)
    _check_names(saved.keys(), own.keys(), f"parameters of {path or 'the module'}")
    for name, shape in own.items():
        yield f"{path}{name}", _tensor(file, saved[name], shape, name=f"{path}{name}")
    inner = {name: child for name, child in children.items() if not _is_bare(child)}
    _check_names(inner.keys(), tree.keys() - own.keys(), f"layers of {path or 'the module'}")
    for name, child in inner.items():
        yield from _below(file, child, tree[name], path=f"{path}{name}.")


def _tensor(file: TorchFile, saved: object, shape: Shape, *, name: str) -> Tensor:
    try:
        tensor = file.parameter(saved, shape)
    except RefusedPickleError as error:
        raise RefusedPickleError(f"{name}: {error}") from error
    if not tensor.isfinite().all():
        raise RefusedPickleError(f"{name}: some of its numbers are not finite")
    return tensor


def _table(module: object, name: str, path: str) -> dict[str, object]:
    """A saved module's parameters or layers by their names; unset ones are left out."""
    table = attributes(module, path or "the file").get(name)
    if not isinstance(table, dict):
        raise RefusedPickleError(f"{path}{name} is no table but {shown(table)}")
    return {key: value for key, value in table.items() if value is not None}


def _is_bare(module: object) -> bool:
    if not isinstance(module, Instance) or module.of not in BARE:
        return False
    return not _table(module, "_parameters", module.of) and not _table(module, "_modules", module.of)


def _check_names(got: Set[str], wanted: Set[str], what: str) -> None:
    if got != wanted:
        told = [f"lacks {', '.join(map(shown, sorted(wanted - got)))}"] if wanted - got else []
        told += [f"has {', '.join(map(shown, sorted(got - wanted)))} besides"] if got - wanted else []
        raise RefusedPickleError(f"the {what} are not the expected ones: it {' and '.join(told)}")
