"""From what a user wrote to a spec, or to the list of all mistakes in it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cim_core.errors import ConfigError
from service.contracts import checks, storable
from service.contracts.addresses import without_secrets
from service.contracts.lessons import missing_for_method, place_of, problems_of, shown, unknown_kind
from service.contracts.problems import FieldProblem
from service.contracts.recipes import expand
from service.contracts.spec_keys import MODELS, Part, dotted
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec
from service.errors import InvalidSpecError

AnySpec = TokenizerSpec | PretrainSpec | EvaluateSpec
_MOST_ROUNDS = 8
_MOST_VALUES = 1_000  # the longest sensible spec has two hundred; each mistake among them takes time
_MOST_PROBLEMS = 200  # of several documents; who has more reads no further
_DEEPEST = 32  # levels; the models have five
_LONGEST_SHOWN = 200  # characters


def parse(raw: object, *, where: str = "") -> AnySpec:
    """The spec that `raw`, a parsed YAML or JSON document, stands for.

    Raises InvalidSpecError with every mistake; `where` goes before each path, e.g. `[1].`.
    """
    spec, problems = examine(raw)
    if spec is None or problems:
        raise InvalidSpecError([at(where, problem) for problem in problems])
    return spec


def parse_all(documents: Sequence[object]) -> list[AnySpec]:
    """Several documents; with more than one, paths begin with the document's number, `[1].`.

    After the document with the 200th mistake the others are not judged.
    """
    specs: list[AnySpec] = []
    problems: list[FieldProblem] = []
    for number, document in enumerate(documents):
        if len(problems) >= _MOST_PROBLEMS:
            break
        try:
            specs.append(parse(document, where=place(number, len(documents))))
        except InvalidSpecError as error:
            problems += error.errors
    if problems:
        raise InvalidSpecError(problems)
    return specs


def place(number: int, count: int) -> str:
    """What goes before the paths of document `number` of `count`."""
    return f"[{number}]." if count > 1 else ""


def at(where: str, problem: FieldProblem) -> FieldProblem:
    """The problem with `where` before its path, fit to be shown."""
    shown = without_secrets(problem)
    return shown.model_copy(update={"path": (where + shown.path).rstrip(".") or "spec"})


def examine(raw: object) -> tuple[AnySpec | None, list[FieldProblem]]:
    """The spec, where one could be made of `raw`, and every mistake found."""
    if _nested_too_deep(raw):
        told = f"a spec must not be nested deeper than {_DEEPEST} levels"
        return None, [FieldProblem(path="", message=told)]
    if _holds_too_much(raw):
        told = f"a spec must not hold more than {_MOST_VALUES} keys and values"
        return None, [FieldProblem(path="", message=told)]
    if not isinstance(raw, dict):
        told = f"a spec must be a mapping of keys to values, got {shown(raw)!r}"
        return None, [FieldProblem(path="", message=told, value=shown(raw))]
    raw, problem = expand(raw)
    if problem is not None:
        return None, [problem]
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        return None, [unknown_kind(raw)]
    return _examine_kind(raw, kind)


def _examine_kind(raw: Mapping[str, Any], kind: str) -> tuple[AnySpec | None, list[FieldProblem]]:
    """Validate, take what is wrong out, validate the rest: a broken part must not hide other mistakes."""
    unstorable = dict(_unstorable(raw))
    told = (*unstorable.values(), *missing_for_method(raw, kind=kind))
    found = {problem.path: problem for problem in told}
    removed = set(unstorable)
    rest: Any = _without(raw, removed)
    for _ in range(_MOST_ROUNDS):
        try:
            spec: AnySpec = MODELS[kind].model_validate(rest)
        except ValidationError as error:
            wrong = _take(error, rest, kind=kind, removed=removed, found=found)
            if not wrong - removed:
                return None, list(found.values())
            removed |= wrong
            rest = _without(raw, removed)
        else:
            found |= {problem.path: problem for problem in _mistaken_truths(rest, spec)}
            for problem in checks.check(spec):
                if not _touches(problem, removed):
                    found.setdefault(problem.path, problem)
            return spec, list(found.values())
    return None, list(found.values())


def _take(
    error: ValidationError,
    rest: Mapping[str, Any],
    *,
    kind: str,
    removed: set[tuple[Part, ...]],
    found: dict[str, FieldProblem],
) -> set[tuple[Part, ...]]:
    """Add what `error` says to `found`; where in the spec something has to go before the next try."""
    wrong: set[tuple[Part, ...]] = set()
    for detail in error.errors(include_url=False):
        parts = place_of(detail, rest, kind=kind)
        cause = detail.get("ctx", {}).get("error")
        names = [name.split(".") for name, _ in cause.problems] if isinstance(cause, ConfigError) else []
        wrong |= {(*parts, *name) for name in names} or {parts}
        # A rule between keys of one object says nothing true once one of them was taken out.
        if names and any(gone[:-1] == parts for gone in removed):
            continue
        for problem in problems_of(detail, rest, kind=kind):
            found.setdefault(problem.path, problem)
    return wrong


def _touches(problem: FieldProblem, removed: set[tuple[Part, ...]]) -> bool:
    """Whether a rule between parts was judged with the default of a key that was taken out."""
    section = problem.path.partition(".")[0]
    return any(gone[:1] in ((section,), ("resources",)) for gone in removed)


def _without(raw: Any, removed: Collection[tuple[Part, ...]]) -> Any:
    """A copy of `raw` in which these places are empty; an item of a list takes the list with it."""
    if not isinstance(raw, dict):
        return raw
    below: dict[Part, list[tuple[Part, ...]]] = {}
    for parts in removed:
        below.setdefault(parts[0], []).append(parts[1:])
    return {
        key: _without(value, below.get(key, ()))
        for key, value in raw.items()
        if key not in below or not (() in below[key] or isinstance(value, list))
    }


def _holds_too_much(raw: object) -> bool:
    todo, num = [raw], 0
    while todo and num <= _MOST_VALUES:
        value = todo.pop()
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(inner, list):
            num += len(inner)
            todo += inner
    return num > _MOST_VALUES


def _nested_too_deep(raw: object) -> bool:
    level = [raw]
    for _ in range(_DEEPEST):
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [item for value in inner if isinstance(value, list) for item in value]
    return bool(level)


def _unstorable(raw: object) -> Iterator[tuple[tuple[Part, ...], FieldProblem]]:
    """Texts and numbers that no database takes."""
    for parts, value, rule in storable.faults(raw):
        readable = [
            repr(part) if isinstance(part, str) and not storable.is_text(part) else part for part in parts
        ]
        got = repr(value)[:_LONGEST_SHOWN]
        yield parts, FieldProblem(path=dotted(readable), message=f"{rule}, got {got}", value=got)


def _mistaken_truths(raw: Mapping[str, Any], spec: AnySpec) -> Iterator[FieldProblem]:
    """`yes` and `true` where a number belongs, which Python takes for 1."""
    todo: list[tuple[tuple[Part, ...], Any, Any]] = [((), raw, spec.model_dump(mode="json"))]
    while todo:
        parts, given, taken = todo.pop()
        if isinstance(given, dict) and isinstance(taken, dict):
            todo += [((*parts, key), value, taken.get(key)) for key, value in given.items()]
        elif isinstance(given, list) and isinstance(taken, list):
            todo += [((*parts, n), pair[0], pair[1]) for n, pair in enumerate(zip(given, taken, strict=True))]
        elif isinstance(given, bool) and not isinstance(taken, bool):
            yield FieldProblem(path=dotted(parts), message=f"must be a number, got {given}", value=given)
