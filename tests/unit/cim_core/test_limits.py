"""No number of any setting is boundless, also where the core is used from Python alone."""

import math
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from cim_core import config
from cim_core.errors import ConfigError
from cim_core.limits import MOST_OF_OPTION, MOST_STEPS

NEEDED: dict[type, dict[str, Any]] = {
    config.Duration: {"steps": 1},
    config.TokenizerConfig: {},
    config.GeneratorConfig: {},
    config.EnhancerConfig: {"name": "resnet18"},
    config.ObjectiveConfig: {"name": "respix"},
    config.DecoderConfig: {},
    config.MaskingConfig: {},
    config.ModelConfig: {"method": "mae", "enhancer": config.EnhancerConfig(name="vit_tiny_patch16_224")},
    config.TrainingConfig: {"steps": 1},
    config.TokenizerTrainingConfig: {"steps": 1},
}
BOUNDLESS = (math.inf, -math.inf, math.nan, 1e308, -1e308, 2**70, -(2**70))


def numbers_of(kind: type) -> list[str]:
    """Fields whose type admits a number."""
    hints = get_type_hints(kind)
    kinds = {field.name: {hints[field.name], *get_args(hints[field.name])} for field in fields(kind)}
    return [name for name, admitted in kinds.items() if admitted & {int, float}]


CASES = [(kind, name) for kind in NEEDED for name in numbers_of(kind)]


def test_cases__hold_every_config_with_a_number() -> None:
    configs = {kind for kind in vars(config).values() if hasattr(kind, "__dataclass_fields__")}
    assert {kind for kind in configs if numbers_of(kind)} <= set(NEEDED)
    assert (config.TrainingConfig, "weight_decay") in CASES


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_number__boundless_ones_are_refused_by_name(kind: type, name: str) -> None:
    for value in BOUNDLESS:
        given = {**NEEDED[kind], name: value}
        if name in ("epochs", "images"):
            del given["steps"]
        with pytest.raises(ConfigError) as refused:
            kind(**given)
        lessons = dict(refused.value.problems)
        assert name in lessons, (value, lessons)
        assert repr(value) in lessons[name]


@pytest.mark.parametrize("value", [*BOUNDLESS, "inf", "1e400", "nan", " 12 "])
@pytest.mark.parametrize("name", ["drop_path_rate", *MOST_OF_OPTION])
def test_option__numbers_that_timm_would_count_with_are_refused(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.EnhancerConfig(name="resnet18", options={name: value})
    ((path, lesson),) = refused.value.problems
    assert path == f"options.{name}"
    assert repr(value) in lesson


def test_option__what_networks_have_is_taken() -> None:
    options: dict[str, config.Scalar] = {
        "depth": 3,
        "drop_path_rate": 0.1,
        "act_layer": "gelu",
        "pre_norm": True,
        "output_stride": 8,
    }
    assert config.EnhancerConfig(name="resnet18", options=options).options == options


def test_length__a_million_million_steps_are_the_end() -> None:
    assert config.Duration(steps=MOST_STEPS).steps == MOST_STEPS
    with pytest.raises(ConfigError, match="must lie between 1 and 1000000000000, got 1000000000001"):
        config.Duration(steps=MOST_STEPS + 1)


def test_beta__one_is_what_adamw_cannot_divide_by() -> None:
    with pytest.raises(ConfigError, match="1 excluded") as refused:
        config.TrainingConfig(steps=1, beta1=1.0, beta2=1.0)
    assert [name for name, _ in refused.value.problems] == ["beta1", "beta2"]
