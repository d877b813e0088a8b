"""docs/spec.md names every key of the spec with its default, and no other."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cim_core.config import Duration
from service.contracts.specs import EvaluateSpec, Knn, PretrainSpec, TokenizerSpec
from tests.architecture.tree import ROOT

PAGE = ROOT / "docs" / "spec.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \| .+\|$")
SECTIONS = {
    TokenizerSpec: ("Every kind", "`kind: tokenizer`", "Training"),
    PretrainSpec: ("Every kind", "`kind: pretrain`", "Training"),
    EvaluateSpec: ("Every kind", "`kind: evaluate`"),
}
REQUIRED = object()


def members(hint: Any) -> list[Any]:
    """The types of a union or an annotation, without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(hint) for m in members(part)]
    return [] if hint is type(None) else [hint]


def nested(hint: Any) -> Any:
    """The config class of a field that has keys of its own, else None. A duration is one value."""
    for part in members(hint):
        if part is Duration or not isinstance(part, type):
            continue
        if dataclasses.is_dataclass(part) or issubclass(part, BaseModel):
            return part
    return None


def fields(cls: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, type, default) of a wire model or a config class."""
    if issubclass(cls, BaseModel):
        for name, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True)
            yield name, info.annotation, REQUIRED if default is PydanticUndefined else default
        return
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            yield field.name, hints[field.name], field.default
        elif field.default_factory is not dataclasses.MISSING:
            yield field.name, hints[field.name], field.default_factory()
        else:
            yield field.name, hints[field.name], REQUIRED


def keys(cls: Any, *, prefix: str = "") -> dict[str, Any]:
    """Every dotted key below a class, with its default."""
    found: dict[str, Any] = {}
    for name, hint, default in fields(cls):
        inner = nested(hint)
        if typing.get_origin(hint) is list:
            found[prefix + name] = ["knn"] if default == [Knn()] else default
            found |= keys(typing.get_args(hint)[0], prefix=f"{prefix}{name}[].")
        elif inner is None:
            found[prefix + name] = default
        else:
            found |= {prefix + name: None} if default is None else {}
            found |= keys(inner, prefix=f"{prefix}{name}.")
    return found


def documented(sections: tuple[str, ...]) -> dict[str, str]:
    """Key and default cell of every row of these sections."""
    rows: dict[str, str] = {}
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif heading in sections and (match := ROW.match(line)):
            assert match[1] not in rows, f"{match[1]} is described twice"
            rows[match[1]] = match[2]
    return rows


def cell_fits(cell: str, default: Any) -> bool:
    """Whether a default cell says what the code does."""
    if default is REQUIRED:
        return cell == "**required**"
    if default is None:
        return re.fullmatch(r"\*[^*]+\*", cell) is not None
    return cell == f"`{json.dumps(default)}`"


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda c: c.__name__)
def test_page__names_every_key_and_no_other(cls: Any) -> None:
    assert set(documented(SECTIONS[cls])) == set(keys(cls))


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda c: c.__name__)
def test_page__states_every_default(cls: Any) -> None:
    page = documented(SECTIONS[cls])
    assert not {k: (page[k], d) for k, d in keys(cls).items() if not cell_fits(page[k], d)}


def test_keys__reach_into_every_level() -> None:
    found = keys(PretrainSpec)
    assert found["model.masking.block_min_cells"] == 16
    assert found["model.enhancer.name"] is REQUIRED
    assert found["training.warmup"] is None
    assert found["probe"] is None
    assert found["probe.train"] is REQUIRED
    assert keys(EvaluateSpec)["tasks[].k"] == 20
