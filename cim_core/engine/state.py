"""All that a resume needs, as one object, and its way to a folder and back.

The folder holds `state.safetensors` (tensors by name: `model/NAME`, `optimizer/KEY/NAME`) and
`state.json` (step, fingerprint, the full list of tensors). Nothing is pickled. Generators and the
sampler's position are not here because they are functions of the step (cim_core/seeding.py).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cim_core.engine.transfer import Copies
from cim_core.errors import CheckpointMismatchError, NonFiniteError

TENSORS, RECORD = "state.safetensors", "state.json"
FORMAT = 1
UNSHARED = 2**14  # numbers; torch shares out from twice as many
# Settings that came later, and what stood for them before: a checkpoint without them is no other run's.
ADDED = {"model.method": "cim"}


@dataclass(kw_only=True)
class TrainState:
    """Model (never wrapped), its optimizer, and the number of completed steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A state as it was, copied to the CPU or on its way there: training may go on meanwhile."""

    tensors: Copies
    record: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write into `folder`, made where missing; an existing state there is replaced.

        The record comes last and as a whole, so that a folder with one holds all (`is_complete`).

        Raises:
            NonFiniteError: a weight or buffer of the model is not finite; nothing was written.
            OSError: the folder cannot be written; what lies in it then is no valid state.
        """
        tensors = self.tensors.wait()
        _check_finite(_below("model/", tensors), step=self.record["step"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        save_file(tensors, folder / TENSORS)
        with (folder / TENSORS).open("rb") as file:
            os.fsync(file.fileno())
        with (folder / f"{RECORD}.new").open("w", encoding="utf-8") as file:
            json.dump(self.record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{RECORD}.new", folder / RECORD)


def take_snapshot(state: TrainState, *, fingerprint: Mapping[str, Any]) -> Snapshot:
    """Copy all of `state`, whose tensors may lie on any device; does not wait for a GPU.

    `fingerprint` is the resolved settings that a resume must share, as a tree of plain values.
    """
    tensors, aliases = _model_tensors(state.model)
    tensors |= _optimizer_tensors(state)
    record = {
        "format": FORMAT,
        "step": state.step,
        "fingerprint": dict(fingerprint),
        "tensors": sorted(tensors),
        "aliases": aliases,
    }
    return Snapshot(Copies(tensors), record)  # safetensors refuses shared and strided memory


def save_state(state: TrainState, folder: Path, *, fingerprint: Mapping[str, Any]) -> None:
    """`take_snapshot` and `Snapshot.write` in one."""
    take_snapshot(state, fingerprint=fingerprint).write(folder)


def is_complete(folder: Path) -> bool:
    """Whether a state was written into `folder` to its end; what is cut off or torn is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(record, dict)


def load_state(state: TrainState, folder: Path, *, fingerprint: Mapping[str, Any]) -> None:
    """Fill `state` in place from `folder`; tensors go to the devices where `state` has them.

    Raises:
        CheckpointMismatchError: files or tensors are missing or broken, the model or the optimizer
            has other tensors, or the fingerprint differs; the message lists every difference, and
            `state` is untouched.
    """
    record = _read_record(folder)
    tensors = _read_tensors(folder)
    expected, aliases = _model_tensors(state.model)
    saved = _below("model/", tensors)
    differences = [
        *_differing_settings(record["fingerprint"], fingerprint),
        *_incomplete(record["tensors"], tensors),
        *_differing_tensors(_below("model/", expected), saved),
        *_differing_aliases(record["aliases"], aliases),
        *_differing_optimizer(state, tensors),
    ]
    if differences:
        listed = "\n".join(f"  - {line}" for line in differences)
        raise CheckpointMismatchError(f"the checkpoint in {folder} does not fit this job:\n{listed}")
    with torch.no_grad():
        for name, target in _below("model/", expected).items():
            target.copy_(saved[name])
    _load_optimizer(state, tensors)
    state.step = record["step"]


def _check_finite(tensors: Mapping[str, Tensor], *, step: int) -> None:
    """On the host: batch norm's statistics and a codebook can break although loss and gradient are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise NonFiniteError(
                f"step {step}: {name} is not finite although the loss was; no checkpoint was made of it."
                " Go on from the one before with a lower training.learning_rate or in fp32"
            )


def _is_finite(tensor: Tensor) -> bool:
    """In portions that torch does not share out among helpers.

    A thread that shared out once keeps its helpers, and as long as it lives each operation of the training
    on a CPU is slower by a quarter (docs/lab-log.md, 2026-11-28).
    """
    # The sum costs a thirtieth of the look at each number, and hides nothing; it may overflow by itself.
    portions = torch.split(tensor.flatten(), UNSHARED)
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in portions)


def _model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by `model/NAME`, each once, and {second name: first name} of shared ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[object, str] = {}
    for name, tensor in model.state_dict().items():
        assert isinstance(tensor, Tensor), f"{name} is extra state, which a checkpoint cannot hold"
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = first_name.setdefault(place if tensor.numel() else name, name)
        if first == name:
            tensors[f"model/{name}"] = tensor
        else:
            aliases[name] = first
    return tensors, aliases


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's tensors by `optimizer/KEY/NAME`, NAME being the parameter's."""
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointMismatchError(f"{folder / RECORD} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointMismatchError(f"{folder / RECORD} is not a training state of format {FORMAT}")
    return record


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / TENSORS)
    except Exception as error:  # safetensors raises its own class, OSError or a Rust panic's text
        raise CheckpointMismatchError(f"{folder / TENSORS} cannot be read: {error}") from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _incomplete(recorded: Iterable[str], found: Mapping[str, Tensor]) -> list[str]:
    lost = [f"{name} is recorded, but not in {TENSORS}" for name in sorted(set(recorded) - set(found))]
    extra = [f"{name} is in {TENSORS}, but not recorded" for name in sorted(set(found) - set(recorded))]
    return lost + extra


def _differing_tensors(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    missing = [f"the checkpoint lacks {name}" for name in expected if name not in saved]
    unexpected = [f"the model has no {name}" for name in saved if name not in expected]
    both = [name for name in expected if name in saved]
    kinds = {name: (_kind(saved[name]), _kind(expected[name])) for name in both}
    other = [
        f"{name} is {was} in the checkpoint, {now} here" for name, (was, now) in kinds.items() if was != now
    ]
    return missing + unexpected + other


def _differing_aliases(saved: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return [
        f"{name} shares memory with {saved.get(name, 'nothing')} in the checkpoint,"
        f" with {expected.get(name, 'nothing')} here"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]


def _differing_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> list[str]:
    """Optimizer tensors of parameters that are not trained here, or of another shape."""
    shapes = {name: parameter.shape for name, parameter in _trained(state).items()}
    lines = []
    for key, tensor in _below("optimizer/", tensors).items():
        name = key.split("/", 1)[1]
        if name not in shapes:
            lines.append(f"{key} belongs to a parameter that the optimizer does not train here")
        elif tensor.dim() and tensor.shape != shapes[name]:
            lines.append(f"{key} has shape {list(tensor.shape)}, the parameter {list(shapes[name])}")
    return lines


def _differing_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    was, here = ADDED | _leaves(saved), ADDED | _leaves(json.loads(json.dumps(dict(now))))
    # None and absent are one: both leave a setting open.
    return [
        f"{key} was {was.get(key, 'absent')!r}, now {here.get(key, 'absent')!r}"
        for key in sorted({*was, *here})
        if was.get(key) != here.get(key)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        leaves |= _leaves(value, f"{dotted}.") if isinstance(value, Mapping) and value else {dotted: value}
    return leaves


def _trained(state: TrainState) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name."""
    ours = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in state.model.named_parameters() if id(p) in ours}


def _load_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Through the optimizer's own loader, which places each tensor as this optimizer wants it."""
    parameters = _trained(state)
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in state.optimizer.param_groups for p in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, tensor in _below("optimizer/", tensors).items():
        key, name = path.split("/", 1)
        by_name.setdefault(name, {})[key] = _laid_out(tensor, parameters[name])
    states = {index: by_name[name] for index, name in enumerate(order) if name in by_name}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` with the strides of its parameter, which a fused optimizer asks for."""
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=tensor.dtype).copy_(tensor)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
