"""What JSON may hold so that every database, and every reader after it, can read it back.

SQLite writes `Infinity` and cannot query the row again; PostgreSQL refuses NUL and half a surrogate pair.
Judged in one place: specs at submit, reports of workers, and whatever a JSON column is about to be written.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

Part = str | int
Place = tuple[Part, ...]

LARGEST_WHOLE = 2**63 - 1  # databases count in 64 bits
LARGEST_NUMBER = 1e300  # a sum of such numbers is still finite
_DEEPEST = 64  # levels; SQLite reads a thousand


class UnstorableError(ValueError):
    """A value that no database takes; the message names its place and the rule."""


def faults(tree: object) -> Iterator[tuple[Place, object, str]]:
    """Place, value and broken rule of everything in `tree` that must not be stored."""
    todo: list[tuple[Place, object]] = [((), tree)]
    while todo:
        place, value = todo.pop()
        if len(place) > _DEEPEST:
            yield place, "...", f"must not be nested deeper than {_DEEPEST} levels"
        elif isinstance(value, dict):
            yield from ((place, key, rule) for key in value if (rule := _key_rule(key)))
            todo += [((*place, str(key)), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            todo += [((*place, number), inner) for number, inner in enumerate(value)]
        elif rule := _rule(value):
            yield place, value, rule


def dumps(tree: object) -> str:
    """`tree` as JSON. Raises UnstorableError: the only way into a JSON column."""
    for place, value, rule in faults(tree):
        where = ".".join(str(part) for part in place) or "the document"
        raise UnstorableError(ascii(f"{where} {rule}, got {value!r}"[:500]))
    return json.dumps(tree, allow_nan=False)


def is_text(value: str) -> bool:
    """Whether every database takes this text: no NUL, and nothing that UTF-8 cannot hold."""
    return "\x00" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _key_rule(key: object) -> str:
    if isinstance(key, str) and is_text(key):
        return ""
    return "must have keys of printable text, without NUL and lone surrogates"


def _rule(value: Any) -> str:
    """The rule that `value`, which is no container, breaks; empty for none."""
    match value:
        case None | bool():
            return ""
        case int():
            sound, rule = abs(value) <= LARGEST_WHOLE, "must be a whole number of at most 63 bits"
        case float():
            sound = math.isfinite(value) and abs(value) <= LARGEST_NUMBER
            rule = f"must be a finite number, at most {LARGEST_NUMBER:g} in size"
        case str():
            sound, rule = is_text(value), "must be printable text, without NUL and lone surrogates"
        case _:
            sound, rule = False, "must be text, a number, true, false, a list or a mapping"
    return "" if sound else rule
