"""How the configuration's classes check themselves: every broken rule of one is told at once."""

from functools import reduce
from typing import Any

from cim_core.errors import ConfigError

# pydantic reads this attribute from plain dataclasses; the core itself does not know pydantic.
STRICT: dict[str, Any] = {"extra": "forbid"}


class Rules:
    """Collects every broken rule of one config, so that all are reported at once."""

    def __init__(self, config: object) -> None:
        self._config = config
        self._problems: list[tuple[str, str]] = []

    def check(self, name: str, rule: str, *, ok: bool) -> None:
        """`name` may be dotted; a part that is left out has the value None."""
        if not ok:
            value = reduce(lambda part, key: getattr(part, key, None), name.split("."), self._config)
            self._problems.append((name, f"{rule}, got {value!r}"))

    def at_least(self, minimum: float, *names: str) -> None:
        """Values that may be None, and else reach `minimum`."""
        for name in names:
            value = getattr(self._config, name)
            self.check(name, f"must be at least {minimum}", ok=value is None or value >= minimum)

    def above(self, minimum: float, *names: str) -> None:
        """Values that may be None, and else exceed `minimum`."""
        for name in names:
            value = getattr(self._config, name)
            self.check(name, f"must be above {minimum}", ok=value is None or value > minimum)

    def within(self, low: float, high: float, *names: str) -> None:
        """Values that may be None, and else lie between `low` and `high`, ends included."""
        for name in names:
            value = getattr(self._config, name)
            rule = f"must lie between {low} and {high}"
            self.check(name, rule, ok=value is None or low <= value <= high)

    def done(self) -> None:
        """Raise ConfigError if a rule was broken."""
        if self._problems:
            raise ConfigError(self._problems)
