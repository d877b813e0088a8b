"""No number that a database, or whatever counts with it, cannot bear gets into a spec, whatever its key.

The keys are read from the schemas themselves, so a new key is tested as soon as it is there.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.contracts.spec_keys import MODELS, Part, Schema, dotted
from tests.fakes.world import Document, World

_HOLE = "hole"
HUGE = 2**70
BARE = ("Infinity", "-Infinity", "NaN", "1e999", "-1e999", "1e308", "-1e308", f"{HUGE}", f"-{HUGE}")
QUOTED = ("inf", "-inf", "nan", "Infinity", "-Infinity", "NaN", "1e400", "-1e400", "1e308", f"{HUGE}")
LITERALS = (*BARE, *(json.dumps(text) for text in QUOTED))
LENGTHS = ("steps", "epochs", "images")


def numeric_keys(kind: str) -> list[tuple[Part, ...]]:
    """Every place of a spec that takes a number."""
    schema = MODELS[kind].model_json_schema()
    return sorted(set(_numbers(schema, schema, ())), key=dotted)


def _numbers(root: Schema, schema: Any, place: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for choice in schema.get("anyOf", ()):
        yield from _numbers(root, choice, place)
    if schema.get("type") in ("integer", "number"):
        yield place
    for key, inner in schema.get("properties", {}).items():
        yield from _numbers(root, inner, (*place, key))
    for key, part in (("items", 0), ("additionalProperties", "depth")):
        if isinstance(inner := schema.get(key), dict):
            yield from _numbers(root, inner, (*place, part))


def with_number(document: Document, place: tuple[Part, ...], literal: str) -> str:
    """`document` as JSON, with `literal` at that place."""
    copy: Any = json.loads(json.dumps(document))
    inner = copy
    *above, last = place
    for part, following in zip(above, place[1:], strict=True):
        if isinstance(part, int):
            inner = inner[part]
        else:
            inner = inner.setdefault(part, [{}] if isinstance(following, int) else {})
    inner[last] = _HOLE
    if last in LENGTHS:  # one of the three alone may be given
        for other in set(LENGTHS) - {last}:
            inner.pop(other, None)
    return json.dumps(copy).replace(json.dumps(_HOLE), literal)


class NumberContract:
    """On the database of the fixture `world`."""

    def test_keys__those_that_everybody_sets_are_found(self) -> None:
        assert {
            ("training", "weight_decay"),
            ("training", "epochs"),
            ("model", "masking", "min_ratio"),
        } <= set(numeric_keys("pretrain"))
        assert ("model", "enhancer", "options", "depth") in numeric_keys("pretrain")
        assert ("tasks", 0, "k") in numeric_keys("evaluate")

    @pytest.mark.parametrize("kind", MODELS)
    async def test_submit__no_boundless_number_in_any_key(self, world: World, kind: str) -> None:
        sound: Document = getattr(world, kind)()
        accepted = []
        for place in numeric_keys(kind):
            for literal in LITERALS:
                problems = await self._refusal(world, with_number(sound, place, literal))
                if dotted(place) not in problems:
                    accepted.append((dotted(place), literal, problems))
        assert not accepted, accepted
        assert (await world.client.get("/v1/jobs")).json()["jobs"] == []

    @pytest.mark.parametrize("literal", LITERALS)
    async def test_submit__none_on_top_of_a_recipe(self, world: World, literal: str) -> None:
        spec = {**world.tokenizer(), "recipe": "tokenizer-64"}
        problems = await self._refusal(world, with_number(spec, ("training", "weight_decay"), literal))
        assert "training.weight_decay" in problems

    @pytest.mark.parametrize("length", LENGTHS)
    async def test_submit__no_length_beyond_a_million_million(self, world: World, length: str) -> None:
        spec = with_number(world.tokenizer(), ("training", length), str(10**12 + 1))
        assert f"training.{length}" in await self._refusal(world, spec)

    @pytest.mark.parametrize("literal", LITERALS)
    async def test_change__no_boundless_priority(self, world: World, literal: str) -> None:
        (job,) = await world.submit(world.tokenizer())
        headers = {"Content-Type": "application/json"}
        body = f'{{"priority": {literal}}}'
        answer = await world.client.patch(f"/v1/jobs/{job['id']}", content=body, headers=headers)
        assert answer.status_code == 422
        assert [error["path"] for error in answer.json()["errors"]] == ["priority"]

    async def _refusal(self, world: World, body: str) -> list[str]:
        """The paths of all mistakes; none where the spec was accepted."""
        headers = {"Content-Type": "application/json"}
        answer = await world.client.post("/v1/jobs", content=body, headers=headers)
        assert answer.status_code in (201, 422), answer.text
        return [error["path"] for error in answer.json()["errors"]] if answer.status_code == 422 else []
