"""The keys that each kind of spec knows, read from the models themselves."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec

Model = type[TokenizerSpec] | type[PretrainSpec] | type[EvaluateSpec]
MODELS: Mapping[str, Model] = {"tokenizer": TokenizerSpec, "pretrain": PretrainSpec, "evaluate": EvaluateSpec}

Part = str | int
Schema = Mapping[str, Any]


def dotted(parts: Sequence[Part]) -> str:
    """`("tasks", 0, "k")` as `tasks[0].k`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def known_keys(kind: str, parts: Sequence[Part]) -> list[str]:
    """The keys of the object at that place of a spec; empty where any key may stand."""
    root = _schema(kind)
    objects = [root]
    for part in parts:
        objects = [inner for outer in objects for inner in _inside(root, outer, part)]
    return sorted({key for one in objects for key in one.get("properties", {})})


def advice(kind: str, parts: Sequence[Part]) -> str:
    """What to write instead of the unknown key at that place."""
    *above, key = parts
    known = known_keys(kind, above)
    if close := difflib.get_close_matches(str(key), known, n=1, cutoff=0.6):
        return f"did you mean {dotted([*above, close[0]])}?"
    if elsewhere := [path for path in _every_key(kind) if path.rpartition(".")[2] == key]:
        return f"it belongs at {' or '.join(elsewhere)}"
    return f"known keys here: {', '.join(known)}"


@cache
def _schema(kind: str) -> Schema:
    return MODELS[kind].model_json_schema()


@cache
def _every_key(kind: str) -> tuple[str, ...]:
    return tuple(_paths(_schema(kind), _schema(kind), ()))


def _paths(root: Schema, schema: Schema, above: tuple[Part, ...]) -> Iterator[str]:
    for one in _objects(root, schema):
        for key, inner in one.get("properties", {}).items():
            yield dotted((*above, key))
            yield from _paths(root, inner, (*above, key))


def _inside(root: Schema, schema: Schema, part: Part) -> list[Schema]:
    if isinstance(part, int):
        return _objects(root, schema.get("items", {}))
    return _objects(root, schema.get("properties", {}).get(part, {}))


def _objects(root: Schema, schema: Schema) -> list[Schema]:
    """What a schema may be: references followed, alternatives side by side."""
    if "$ref" in schema:
        return _objects(root, root["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [one for choice in schema["anyOf"] for one in _objects(root, choice)]
    return [schema]
