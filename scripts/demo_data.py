"""The demo's specs, with the user's own pictures where some are given."""

import tarfile
from pathlib import Path
from typing import Any

from scripts.demo_service import DemoError
from service.cli import specs

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "demo.yaml"
TRAINED = ("tokenizer", "pretrain")
CPUS = 2

Spec = dict[str, Any]


def load(data: Path | None, *, num_cpus: int) -> tuple[list[Spec], list[str]]:
    """The specs of examples/demo.yaml and notes on what was changed in them.

    With `data`, tokenizer and pretrain read that folder or tar; evaluate keeps the bundled tiles,
    because it needs labels and a val set.

    Raises:
        DemoError: `data` is not there or holds no file.
    """
    found = specs.load(str(EXAMPLE))
    notes: list[str] = []
    for spec in found:
        spec["resources"]["cpus_per_worker"] = min(CPUS, num_cpus)
    if data is not None:
        notes += _use(found, data.expanduser().resolve())
    return found, notes


def count_files(data: Path) -> int:
    """Files of a folder with all below it, or members of a tar; not all of them need be pictures.

    Raises:
        DemoError: It is neither.
    """
    if data.is_dir():
        return sum(path.is_file() for path in data.rglob("*"))
    try:
        with tarfile.open(data, mode="r:") as archive:
            return sum(member.isfile() for member in archive)
    except FileNotFoundError as error:
        raise DemoError(f"DATA={data}: there is no such folder or file") from error
    except (OSError, tarfile.TarError) as error:
        raise DemoError(f"DATA={data}: neither a folder nor an uncompressed .tar file ({error})") from error


def _use(found: list[Spec], data: Path) -> list[str]:
    num_files = count_files(data)
    if num_files == 0:
        raise DemoError(f"DATA={data}: it holds no file")
    notes = [
        f"tokenizer and pretrain read {data} ({num_files} files); evaluate keeps the bundled labelled tiles"
    ]
    for spec in found:
        if spec["kind"] in TRAINED:
            spec["data"]["uri"] = str(data)
            notes += _fit_batch(spec, num_files)
    return notes


def _fit_batch(spec: Spec, num_files: int) -> list[str]:
    """Lower the batch to what a small folder can fill, with room for held-out pictures."""
    training = spec["training"]
    batch_size = training["batch_size"]
    while batch_size > max(1, num_files // 2):
        batch_size //= 2
    if batch_size == training["batch_size"]:
        return []
    training["batch_size"] = batch_size
    return [
        f"{spec['name']}: training.batch_size lowered to {batch_size}, for there are only {num_files} files"
    ]
