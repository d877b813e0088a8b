"""How the configuration's classes check themselves: every broken rule of one is told at once.

Every rule about a number has two ends. A number without an upper bound can be infinite, or large enough
to stop whatever counts with it: the service, its database, a worker.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from cim_core.errors import ConfigError

# pydantic reads this attribute from plain dataclasses; the core itself does not know pydantic. Without
# `allow_inf_nan` it would take the text "inf", as YAML reads a bare inf, for a number.
STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


class Rules:
    """Collects every broken rule of one config, so that all are reported at once."""

    def __init__(self, config: object) -> None:
        self._config = config
        self._problems: list[tuple[str, str]] = []

    def check(self, name: str, rule: str, *, ok: bool) -> None:
        """`name` may be dotted; a part that is left out has the value None."""
        if not ok:
            value = reduce(_inside, name.split("."), self._config)
            self._problems.append((name, f"{rule}, got {value!r}"))

    def within(self, low: float, high: float, *names: str) -> None:
        """Values that may be None, and else lie between `low` and `high`, ends included; no NaN does."""
        for name in names:
            value = getattr(self._config, name)
            rule = f"must lie between {low} and {high}"
            self.check(name, rule, ok=value is None or low <= value <= high)

    def above(self, low: float, high: float, *names: str) -> None:
        """Values that may be None, and else lie above `low`, up to `high` included; no NaN does."""
        for name in names:
            value = getattr(self._config, name)
            rule = f"must be above {low} and at most {high}"
            self.check(name, rule, ok=value is None or low < value <= high)

    def done(self) -> None:
        """Raise ConfigError if a rule was broken."""
        if self._problems:
            raise ConfigError(self._problems)


def _inside(part: Any, key: str) -> Any:
    return part.get(key) if isinstance(part, Mapping) else getattr(part, key, None)
