"""A configuration with other values at dotted paths."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Changes = Mapping[str, Any]


def changed(config: Any, changes: Changes) -> Any:
    """`config` with other values at dotted paths; values that rules tie together may be changed at once."""
    inner: dict[str, dict[str, Any]] = {}
    direct: dict[str, Any] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    merged = {
        name: changed(direct.pop(name, getattr(config, name)), deeper) for name, deeper in inner.items()
    }
    return dataclasses.replace(config, **direct, **merged)
