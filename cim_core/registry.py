"""Names of the configuration and what they build; adding an objective is one line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cim_core.config import ObjectiveConfig
from cim_core.objectives.base import Objective
from cim_core.objectives.respix import Respix
from cim_core.objectives.revdet import Revdet

OBJECTIVES: Mapping[str, Callable[..., Objective]] = MappingProxyType({"respix": Respix, "revdet": Revdet})

# Lambda before the enhancer's loss where the configuration leaves it open; docs/method.md.
DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType({"respix": 10.0, "revdet": 1.0})


def build_objective(
    config: ObjectiveConfig, *, width: int, feature_side: int, image_size: int, grid: int
) -> Objective:
    """The objective that `config` names, for a feature map of `width` channels."""
    build = OBJECTIVES[config.name]
    return build(config, width=width, feature_side=feature_side, image_size=image_size, grid=grid)
