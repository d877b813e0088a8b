"""What lies at an address on this machine, as far as a submit may look. Every look is bounded."""

import os
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import islice, takewhile
from pathlib import Path

from cim_core.data.sources import expand_braces
from cim_core.errors import DataError
from service.contracts.allowed import Allowed
from service.store.links import leads_out

_MODEL_FILES = ("config.json", "model.safetensors")
_MOST_NAMES = 2_000  # of those that braces stand for
_MOST_LOOKS = 50_000  # entries of folders; beyond them the workers have to see for themselves


def leaves(uri: str, allowed: Allowed) -> bool:
    """Whether the part of a path that holds no pattern leads out of every allowed folder."""
    if allowed.anywhere_local:
        return False
    fixed = takewhile(lambda part: not set(part) & set("*?[{"), Path(uri).parts)
    return leads_out(Path(*fixed), allowed.folders) or (
        os.path.lexists(uri) and leads_out(uri, allowed.folders)
    )


def images_fault(uri: str) -> str:
    """Why no images can be read there; empty where it seems that they can."""
    try:
        if os.path.isdir(uri):
            return "" if _holds_a_file(uri) else f"the folder {uri} holds no files; put images into it"
        if os.path.isfile(uri):
            return "" if uri.endswith(".tar") else f"must be a folder or a .tar, got the file {uri}"
        if any(_is_there(pattern) for pattern in islice(expand_braces(uri), _MOST_NAMES)):
            return ""
    except DataError as error:
        return str(error).removeprefix("data.uri: ")
    except OSError as error:
        return f"{uri} cannot be read: {error.strerror}"
    rule = "no file fits the pattern" if has_magic(uri) or "{" in uri else "there is no folder or file"
    return f"{rule} {uri} on the machine of the service"


def model_fault(uri: str) -> str:
    """Why the folder is none of a trained network."""
    missing = [name for name in _MODEL_FILES if not os.path.isfile(os.path.join(uri, name))]
    if not missing:
        return ""
    return f"must be a folder with {' and '.join(_MODEL_FILES)}; {uri} lacks {' and '.join(missing)}"


def file_fault(uri: str) -> str:
    """Whether a file is missing."""
    return "" if os.path.isfile(uri) else f"there is no file {uri} on the machine of the service"


def _is_there(pattern: str) -> bool:
    """Whether a file fits a pattern of shards, or may fit it for all that can be seen in time."""
    first, *rest = Path(pattern).parts
    todo, looks = [(first, tuple(rest))], 0
    while todo:
        folder, parts = todo.pop()
        if not parts:
            if os.path.isfile(folder):
                return True
            continue
        part, below = parts[0], parts[1:]
        if not has_magic(part):
            todo.append((os.path.join(folder, part), below))
            continue
        listed = _names_in(folder)
        looks += len(listed)
        if looks > _MOST_LOOKS:
            return True
        names = [name for name in listed if not name.startswith(".")]
        if part == "**":
            todo += [(os.path.join(folder, name), parts) for name in names]
            todo.append((folder, below))
        else:
            todo += [(os.path.join(folder, name), below) for name in names if fnmatchcase(name, part)]
    return False


def _names_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as listed:
            return [entry.name for entry in islice(listed, _MOST_LOOKS + 1)]
    except OSError:  # a file, or a folder of somebody else
        return []


def _holds_a_file(folder: str) -> bool:
    """Whether a file lies at any depth; ends at the first one, or where there is too much to look at."""
    todo, looks = [folder], 0
    while todo:
        looks += 1
        with os.scandir(todo.pop()) as listed:
            for entry in listed:  # not all of them first: a folder may hold ten million
                looks += 1
                shown = not entry.name.startswith(".")
                if looks > _MOST_LOOKS or (shown and os.path.isfile(entry.path)):
                    return True
                if shown and entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return False
