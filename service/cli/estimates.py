"""What `cim validate` prints: specs as YAML, each followed by what it will take."""

from collections.abc import Iterator, Mapping

from service.cli.render import as_yaml, number, size
from service.contracts.estimates import Cost, Estimate
from service.contracts.jobs import Validation

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def validation_text(validation: Validation) -> str:
    """The resolved specs, each followed by its estimate in comments, as YAML."""
    documents = []
    for index, resolved in enumerate(validation.resolved):
        text = as_yaml(resolved)
        if index < len(validation.estimate):
            lines = estimate_lines(validation.estimate[index])
            text += "\n".join(["# estimate", *(f"#   {line}" for line in lines)]) + "\n"
        documents.append(text)
    return "---\n".join(documents)


def estimate_lines(estimate: Estimate) -> Iterator[str]:
    """What is known, a line a subject."""
    yield f"resources: workers {estimate.workers}, CPUs {estimate.cpus}, GPUs {estimate.gpus}"
    counts = {"steps": estimate.steps, "images": estimate.images, "files": estimate.files}
    known = [f"{count:,} {name}" for name, count in counts.items() if count is not None]
    if estimate.epochs is not None:
        known.append(f"{estimate.epochs:g} epochs")
    if known:
        yield f"length: {', '.join(known)}"
    if estimate.depends_on:
        yield f"still open: {estimate.depends_on}"
    if estimate.cost is not None:
        yield from _cost_lines(estimate.cost, estimate)


def _cost_lines(cost: Cost, estimate: Estimate) -> Iterator[str]:
    memory = cost.memory_per_worker
    parts = memory.model_dump()
    peak = size(parts.pop("peak_bytes"))
    beside = ""
    if estimate.gpus and memory.snapshot_bytes:
        beside = f"; in the host's memory a checkpoint's copy of {size(parts.pop('snapshot_bytes'))}"
    shown = ", ".join(
        f"{name.removesuffix('_bytes')} {size(value)}" for name, value in parts.items() if value
    )
    yield f"parameters: {_shares(cost.parameters)}"
    yield f"MACs of an image, forward: {_shares(cost.macs_per_image)}"
    yield f"MACs of an image, in a training step: {short(cost.macs_per_training_image)}"
    at = f"{estimate.images_per_pass} images a pass, {estimate.precision}"
    yield f"memory of a worker: {peak} at most, at {at}; {shown}{beside}"


def _shares(parts: Mapping[str, int]) -> str:
    """`3.4 M (enhancer 3 M, head 0.4 M)`; parts that are empty are left out."""
    shown = ", ".join(f"{name.replace('_', ' ')} {short(value)}" for name, value in parts.items() if value)
    return f"{short(sum(parts.values()))} ({shown})"


def short(value: float) -> str:
    """Three digits and a unit: `4.6 G`."""
    for factor, unit in _UNITS:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return number(value)
