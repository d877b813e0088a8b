"""Config classes are frozen, keyword-only and strict; every choice they offer exists."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cim_core import config, export, masking, masking_config, methods, registry
from cim_core.models import generator, heads
from cim_core.objectives import respix
from cim_core.tokenizers import quantise
from service.contracts import recipes, specs
from service.contracts.base import Contract

CONFIGS = [c for _, c in inspect.getmembers(config, dataclasses.is_dataclass) if isinstance(c, type)]
WIRE = [c for _, c in inspect.getmembers(specs, inspect.isclass) if issubclass(c, Contract)]
MINIMAL: dict[str, dict[str, Any]] = {
    "Duration": {"steps": 1},
    "TokenizerSource": {"source": "job:tok"},
    "EnhancerConfig": {"name": "resnet18"},
    "ObjectiveConfig": {"name": "respix"},
    "ModelConfig": {
        "tokenizer": {"source": "job:tok"},
        "enhancer": {"name": "resnet18"},
        "objective": {"name": "respix"},
    },
    "TrainingConfig": {"steps": 1},
    "TokenizerTrainingConfig": {"steps": 1},
}


def test_configs__all_are_found() -> None:
    assert {c.__name__ for c in CONFIGS} >= {"ModelConfig", "TrainingConfig", "TokenizerConfig", *MINIMAL}


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_configs__are_frozen_and_keyword_only(cls: Any) -> None:
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_configs__refuse_unknown_keys(cls: Any) -> None:
    adapter = TypeAdapter(cls)
    good = MINIMAL.get(cls.__name__, {})
    adapter.validate_python(good)
    with pytest.raises(ValidationError, match="surplus"):
        adapter.validate_python({**good, "surplus": 1})


@pytest.mark.parametrize("cls", WIRE, ids=lambda c: c.__name__)
def test_wire_models__are_frozen_and_refuse_unknown_keys(cls: type[Contract]) -> None:
    assert cls.model_config.get("frozen") is True
    assert cls.model_config.get("extra") == "forbid"


def choices(cls: Any, field: str) -> set[str]:
    """What a `Literal` field offers."""
    found = literals(typing.get_type_hints(cls)[field])
    return found or set()


def literals(hint: Any) -> set[str] | None:
    """The values of a `Literal`, alone or in a union; None for any other type."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    inside = [part for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal]
    return set(typing.get_args(inside[0])) if inside else None


@pytest.mark.parametrize(
    ("cls", "field", "entries"),
    [
        (config.ObjectiveConfig, "name", registry.OBJECTIVES),
        (config.ObjectiveConfig, "name", registry.DEFAULT_WEIGHTS),
        (config.ObjectiveConfig, "normalise", respix.STATISTICS),
        (config.ObjectiveConfig, "upsample", heads.UPSAMPLE),
        (config.GeneratorConfig, "positions", generator.BLOCKS),
        (config.MaskingConfig, "strategy", masking._STRATEGIES),
        (config.ModelConfig, "method", methods.METHODS),
        (config.ModelConfig, "method", masking_config.MASKING),
        (config.ModelConfig, "method", config.NEEDED),
        (config.ModelConfig, "method", export.METHOD_NAMES),
        (config.ModelConfig, "method", recipes.METHODS),
        (config.TokenizerConfig, "quantiser", quantise.QUANTISERS),
    ],
)
def test_choices__each_has_an_entry_and_each_entry_is_a_choice(
    cls: Any, field: str, entries: Mapping[str, object]
) -> None:
    assert choices(cls, field) == set(entries)


def test_choices__each_is_looked_at_here() -> None:
    literal = {
        (cls.__name__, name)
        for cls in CONFIGS
        for name, hint in typing.get_type_hints(cls).items()
        if literals(hint) is not None
    }
    # Precision is a flag of the loop (autocast on or off), interpolation a word that torch is handed as it
    # is; neither is something to be built.
    assert literal == {
        ("TrainingConfig", "precision"),
        ("TokenizerTrainingConfig", "precision"),
        ("ModelConfig", "interpolation"),
        ("ModelConfig", "method"),
        ("ObjectiveConfig", "name"),
        ("ObjectiveConfig", "normalise"),
        ("ObjectiveConfig", "upsample"),
        ("GeneratorConfig", "positions"),
        ("MaskingConfig", "strategy"),
        ("TokenizerConfig", "quantiser"),
    }


@pytest.mark.parametrize("objective", sorted(registry.OBJECTIVES))
def test_objectives__each_has_a_test_module(objective: str) -> None:
    tests = Path(__file__).parent.parent / "unit" / "cim_core"
    assert list(tests.rglob(f"test_{objective}*.py"))
