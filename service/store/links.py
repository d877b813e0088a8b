"""Where paths of a machine really lead."""

import os
from collections.abc import Iterable
from pathlib import Path


def leads_out(path: str | Path, folders: Iterable[str]) -> bool:
    """Whether `path`, its links followed, lies in none of `folders`. What is not there leads nowhere else."""
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
