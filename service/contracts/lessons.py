"""Pydantic's findings as lessons: a dotted path, the rule, the value received, what to do."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from cim_core.config import NEEDED
from cim_core.errors import ConfigError
from service.contracts.problems import FieldProblem
from service.contracts.spec_keys import MODELS, Part, advice, dotted

_LONGEST_VALUE = 200

# What to write where a key without a default is missing.
_REQUIRED = {
    "name": "a label for the job, for example name: street-vit-s",
    "data": "the images, for example data: {uri: /absolute/folder}",
    "data.uri": "a folder, s3://bucket/prefix/, or .tar shards",
    "model": "what to train: tokenizer, enhancer and objective",
    "model.tokenizer": "for example tokenizer: {source: job:my-tokenizer}",
    "model.tokenizer.source": "job:NAME of a tokenizer job, the address of a tokenizer folder, or dall-e",
    "model.enhancer": "for example enhancer: {name: vit_small_patch16_224}",
    "model.enhancer.name": "a timm model name, for example vit_small_patch16_224 or resnet50",
    "model.objective": "for example objective: {name: respix}",
    "model.objective.name": "respix or revdet",
    "training": "how long, for example training: {epochs: 300}",
    "encoder": "job:NAME of a pretrain job, or the address of an encoder folder",
}
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_NOT_A_MAPPING = {"model_type", "model_attributes_type", "dataclass_type", "dict_type", "mapping_type"}


def problems_of(error: ErrorDetails, raw: Mapping[str, Any], *, kind: str) -> Iterator[FieldProblem]:
    """One finding about the spec `raw`; a config that broke several of its rules gives several."""
    parts = place_of(error, raw, kind=kind)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        for name, lesson in cause.problems:
            inner = (*parts, *name.split("."))
            value = shown(_value_at(raw, inner))
            yield FieldProblem(path=dotted(inner), message=lesson.removesuffix(", got None"), value=value)
        return
    yield FieldProblem(
        path=dotted(parts), message=_lesson(error, parts, kind=kind), value=shown(_value_at(raw, parts))
    )


def missing_for_method(raw: Mapping[str, Any], *, kind: str) -> Iterator[FieldProblem]:
    """What the method of a pre-training cannot do without. Where another key is broken, no model tells."""
    model = raw.get("model")
    if kind != "pretrain" or not isinstance(model, Mapping):
        return
    method = model.get("method", "cim")
    for name in NEEDED.get(method, ()) if isinstance(method, str) else ():
        if model.get(name) is None:
            path = f"model.{name}"
            yield FieldProblem(path=path, message=f"is required: {_REQUIRED[path]}")


def place_of(error: ErrorDetails, raw: Mapping[str, Any], *, kind: str) -> tuple[Part, ...]:
    """Where in the spec a finding lies. Pydantic also names the members of unions on its way."""
    loc = error["loc"][1:] if error["loc"][:1] == (kind,) else error["loc"]
    parts: list[Part] = []
    value: Any = raw
    for part in loc:
        here = isinstance(part, int) if isinstance(value, list) else isinstance(value, dict) and part in value
        if not here and error["type"] != "missing":
            break
        parts.append(part)
        value = _inner(value, part)
    return tuple(parts)


def shown(value: Any) -> Any:
    """The value as it may go into an answer: not longer than a line."""
    text = repr(value)
    return value if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _lesson(error: ErrorDetails, parts: Sequence[Part], *, kind: str) -> str:
    if error["type"] == "missing":
        hint = _REQUIRED.get(dotted(parts))
        return f"is required: {hint}" if hint else "is required"
    if error["type"] in _UNKNOWN:
        return f"is not a key; {advice(kind, parts)}"
    got = f", got {shown(error['input'])!r}"
    if error["type"] in _NOT_A_MAPPING:
        return f"must be a mapping of keys to values{got}"
    if error["type"] == "literal_error":
        return _choice(error) + got
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return text.replace("Input should have", "must have").replace("String should", "must") + got


def _choice(error: ErrorDetails) -> str:
    expected = str(error.get("ctx", {}).get("expected", ""))
    text = f"must be {expected}"
    near = difflib.get_close_matches(str(error["input"]), expected.replace("'", "").split(" or "), n=1)
    return f"{text} (did you mean {near[0]}?)" if near else text


def unknown_kind(raw: Mapping[str, Any]) -> FieldProblem:
    """The lesson for a spec whose `kind` is missing or not one of ours."""
    known = ", ".join(MODELS)
    if "kind" not in raw:
        return FieldProblem(path="kind", message=f"is required: one of {known}")
    kind = raw["kind"]
    if kind == "sweep":
        message = f"sweeps are not available in this version; known kinds: {known}"
        return FieldProblem(path="kind", message=message, value=kind)
    near = difflib.get_close_matches(str(kind), MODELS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return FieldProblem(
        path="kind", message=f"must be one of {known}, got {shown(kind)!r}{hint}", value=shown(kind)
    )


def _inner(value: Any, part: Part) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    inside = isinstance(value, list) and isinstance(part, int) and part < len(value)
    return value[part] if inside else None


def _value_at(raw: Any, parts: Sequence[Part]) -> Any:
    for part in parts:
        raw = _inner(raw, part)
    return raw
