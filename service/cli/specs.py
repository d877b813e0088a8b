"""Spec files to JSON: YAML with several documents, `--set`, relative paths.

Relative paths in a file are meant from that file's folder, as docker compose does it, so that a
spec works wherever it is submitted from. Paths in `--set` are meant from the working folder.
"""

import json
import re
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

Spec = dict[str, Any]

STDIN = "-"
FOLDERS = ("data.uri", "data.train", "data.val", "probe.train", "probe.val")
FILES = ("model.tokenizer.encoder", "model.tokenizer.decoder")
ARTIFACTS = ("model.tokenizer.source", "encoder")  # these may also be words such as `dall-e` or `random`
ELSEWHERE = re.compile(r"^(job:|[A-Za-z][A-Za-z0-9+.-]*://)")
MERGE = "tag:yaml.org,2002:merge"
FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class SpecFileError(ValueError):
    """A spec file or a `--set` is wrong; nothing was queued."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, less its surprises: `1e-3` is a number, dates are text, a key
    that comes twice is refused. A number that JSON cannot carry, such as `.inf` or `1e999`, is sent
    as the text that it is, so that the service names its place among all other mistakes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  a class attribute of PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE]
        known: set[tuple[str, str]] = set()
        for key in keys:
            if (key.tag, key.value) in known:
                problem = f"the key {key.value!r} comes twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            known.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> float | int | str:
        """The number, where JSON has it; else its text."""
        whole = node.tag == "tag:yaml.org,2002:int"
        try:
            number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:  # such as more digits than Python reads
            return str(node.value)
        return number if abs(number) <= sys.float_info.max else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def load(file: str, *, sets: Sequence[str] = ()) -> list[Spec]:
    """The specs of a file (`-` reads standard input), ready to be sent.

    Args:
        file: YAML, one or several documents, or JSON, one object or a list of them.
        sets: `a.b=VALUE` changes every document, `NAME:a.b=VALUE` the one of that name. VALUE is
            read as YAML; missing keys are made. The service refuses those it does not know.

    Raises:
        SpecFileError: The file or a `--set` cannot be read.
    """
    text, folder = _read(file)
    specs = _documents(text, file)
    for spec in specs:
        _make_absolute(spec, folder)
    for one in sets:
        _apply(specs, one)
    for spec in specs:
        _make_absolute(spec, Path.cwd())
        _check_json(spec, file)
    return specs


def _read(file: str) -> tuple[str, Path]:
    try:
        if file == STDIN:
            return sys.stdin.read(), Path.cwd()
        path = Path(file)
        return path.read_text("utf-8"), path.absolute().parent
    except UnicodeDecodeError as error:
        raise SpecFileError(f"{file} is not a text file in UTF-8: {error}") from error
    except OSError as error:
        raise SpecFileError(f"cannot read {file}: {error.strerror}") from error


def _documents(text: str, file: str) -> list[Spec]:
    try:
        found = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        raise SpecFileError(f"{file} is not valid YAML: {_place(error)}") from error
    specs = [spec for document in found for spec in (document if isinstance(document, list) else [document])]
    for spec in specs:
        if not isinstance(spec, dict):
            raise SpecFileError(f"{file}: a spec is a mapping of keys to values, got {str(spec)[:60]!r}")
    if not specs:
        raise SpecFileError(f"{file} holds no spec")
    return specs


def _place(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _apply(specs: Sequence[Spec], assignment: str) -> None:
    target, found, text = assignment.partition("=")
    name, named, path = target.rpartition(":")
    if not found or not path.strip(". ") or "" in path.split("."):
        raise SpecFileError(f"--set wants a.b=VALUE or NAME:a.b=VALUE, got {assignment!r}")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise SpecFileError(f"--set {target}: the value is not valid YAML: {_place(error)}") from error
    chosen = [spec for spec in specs if not named or spec.get("name") == name]
    if not chosen:
        names = ", ".join(str(spec.get("name")) for spec in specs)
        raise SpecFileError(f"--set {assignment}: no spec is called {name!r}; there is {names}")
    for spec in chosen:
        _set(spec, path, value)


def _set(spec: Spec, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = spec
    for depth, key in enumerate(parents):
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = _inside(place, key, ".".join(parents[:depth]) or "the spec")
    if isinstance(place, dict):
        place[last] = value
    else:
        _inside(place, last, ".".join(parents))
        place[int(last)] = value


def _inside(place: Any, key: str, where: str) -> Any:
    if isinstance(place, dict):
        return place[key]
    if not isinstance(place, list):
        raise SpecFileError(f"--set: {where} is {place!r} and has no {key!r} inside")
    if not key.isdecimal() or int(key) >= len(place):
        raise SpecFileError(
            f"--set: {where} is a list of {len(place)}; {key!r} must be 0 to {len(place) - 1}"
        )
    return place[int(key)]


def _make_absolute(spec: Spec, folder: Path) -> None:
    for key in FOLDERS + FILES + ARTIFACTS:
        *parents, last = key.split(".")
        place: Any = spec
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(last), str):
            place[last] = _absolute(place[last], folder, only_if_a_path=key in ARTIFACTS)


def _absolute(value: str, folder: Path, *, only_if_a_path: bool) -> str:
    if not value or ELSEWHERE.match(value):
        return value
    if value.startswith("/"):
        return str(Path(value).resolve()) if ".." in value.split("/") else value
    if value.startswith("~"):
        return str(Path(value).expanduser())
    if only_if_a_path and "/" not in value and not (folder / value).exists():
        return value  # a word of the service's, or a mistake that it should name
    return str((folder / value).resolve()) if ".." in value.split("/") else str(folder / value)


def _check_json(spec: Spec, file: str) -> None:
    try:
        json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecFileError(f"{file} holds a value that JSON cannot: {error}") from error
