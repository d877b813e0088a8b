"""Recipes: each is sound, explains every number, and its header says what the counter says."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from cim_core.config import ModelConfig, TokenizerConfig, TrainingConfig
from cim_core.estimate.cost import Cost, pretrain_cost, tokenizer_cost
from service.contracts.parsing import parse, parse_all
from service.contracts.recipes import Recipe, expand, known_recipes, merged
from service.contracts.resolving import resolve
from service.errors import InvalidSpecError
from tests.fakes.world import World

RECIPES = known_recipes()
PAPER = [f"cim-{name}-{way}" for name in ("resnet50", "vit-b16", "vit-s16") for way in ("respix", "revdet")]
IMAGENET = 1_281_167
REASON = re.compile(r"  # (source: \S|recollection|ours)")
each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def own(recipe: str, **changes: Any) -> dict[str, Any]:
    """What a user has to write."""
    return {"recipe": recipe, "name": "mine", "data": {"uri": "/images"}, **changes}


def leaves(tree: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield from leaves(value, *above, key) if isinstance(value, dict) else [(*above, key)]


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if path[1:] else value}


def test_recipes__the_papers_runs_and_small_ones_are_there() -> None:
    assert set(PAPER) < set(RECIPES)
    small = set(RECIPES) - set(PAPER)
    assert {RECIPES[name].kind for name in small} == {"tokenizer", "pretrain"}
    for name in PAPER:
        assert (RECIPES[name].epochs, RECIPES[name].objective) == (300, name.rsplit("-", 1)[-1])
        assert RECIPES[name].spec["model"]["tokenizer"]["source"] == "dall-e"


@each
def test_recipes__are_sound_once_name_and_data_are_given(recipe: Recipe) -> None:
    spec = parse(own(recipe.name))
    assert (spec.kind, spec.name) == (recipe.kind, "mine")
    resolved = resolve(spec)
    assert resolved["recipe"] == recipe.name
    assert leaves_of(resolved).items() >= leaves_of(recipe.spec).items()


def leaves_of(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    found = {}
    for path in leaves(tree):
        value: Any = tree
        for key in path:
            value = value[key]
        found[path] = value
    return found


@each
def test_recipes__every_value_says_where_it_comes_from(recipe: Recipe) -> None:
    lines = [line for line in recipe.text.splitlines() if not line.startswith("#")]
    values = [line for line in lines if not re.fullmatch(r" *[a-z_]+:", line)]
    assert len(values) == len(list(leaves(recipe.spec)))  # one value a line
    assert not [line for line in values if not REASON.search(line)]


@each
def test_recipes__begin_with_what_they_are(recipe: Recipe) -> None:
    assert recipe.text.startswith(f"# {recipe.description}\n#\n")
    assert recipe.description.endswith(".")
    assert max(len(line) for line in recipe.text.splitlines()) <= 120


def counted(recipe: Recipe) -> Cost:
    """On a batch of two, since the cost of an image does not depend on it."""
    training = TrainingConfig(steps=1, batch_size=2, precision="fp32")
    if recipe.kind == "tokenizer":
        return tokenizer_cost(tokenizer_of(recipe), training)
    model = TypeAdapter(ModelConfig).validate_python(recipe.spec["model"])
    before = None if recipe.name in PAPER else tokenizer_of(RECIPES[named_tokenizer(recipe)])
    return pretrain_cost(model, training, tokenizer=before)


def tokenizer_of(recipe: Recipe) -> TokenizerConfig:
    return TypeAdapter(TokenizerConfig).validate_python(recipe.spec["model"])


def named_tokenizer(recipe: Recipe) -> str:
    return str(recipe.spec["model"]["tokenizer"]["source"].removeprefix("job:"))


SMALL = [name for name, recipe in RECIPES.items() if recipe.kind == "pretrain" and name not in PAPER]


@pytest.mark.parametrize("name", SMALL)
def test_recipes__small_ones_want_a_tokenizer_of_half_a_patch(name: str) -> None:
    """BEiT's ratio: 112 pixels for the tokenizer, 224 for the encoder."""
    recipe = RECIPES[name]
    wanted = named_tokenizer(recipe)
    assert f"wants a tokenizer job named {wanted}." in recipe.description
    assert 2 * tokenizer_of(RECIPES[wanted]).stride == recipe.spec["model"]["patch_size"]


@each
def test_recipes__say_in_their_header_what_the_counter_says(recipe: Recipe) -> None:
    cost = counted(recipe)
    told = re.search(
        r"^# MACs of an image in a training step: (\S+) G\n#   forward: (.+)$", recipe.text, re.M
    )
    assert told is not None
    assert told[1] == billions(cost.macs_per_training_image)
    parts = [f"{name.replace('_', ' ')} {billions(macs)} G" for name, macs in cost.macs_per_image.items()]
    assert told[2] == ", ".join(parts)


def billions(macs: int) -> str:
    return f"{macs / 1e9:.1f}" if macs >= 1e10 else f"{macs / 1e9:.2f}"


@each
def test_recipes__hours_are_an_estimate_that_shows_its_sum(recipe: Recipe) -> None:
    told = re.search(
        r"^# [CG]PU hours: about (\S+?)( for 10000 images)?, an estimate; nothing was measured:\n"
        r"#   (\d+) epochs x (\d+) images x (\S+)e9 MACs x 2 / (\S+)e9? ?a second / 3600\n"
        r"# .* are what we assume",
        recipe.text.replace("100e12 a", "100000e9 a"),
        re.M,
    )
    assert told is not None
    epochs, images, macs, rate = (float(told[number]) for number in (3, 4, 5, 6))
    assert epochs == recipe.epochs
    assert images == (10_000 if told[2] else IMAGENET)
    step = re.search(r"training step: (\S+) G", recipe.text)
    assert step is not None
    assert float(step[1]) == macs
    hours = epochs * images * macs * 2 / rate / 3600
    assert told[1] == (f"{hours:.1f}" if told[2] else f"{hours:.0f}")


@each
def test_recipes__resolving_what_was_resolved_changes_nothing(recipe: Recipe) -> None:
    """Also where a value of the recipe was taken back: a key that then is left out would return."""
    changes = [{}, *(nested(path, None) for path in leaves(recipe.spec))]
    for change in changes:
        try:
            once = resolve(parse(merged(own(recipe.name), change)))
        except InvalidSpecError:
            continue  # most keys cannot be empty
        assert resolve(parse(once)) == once, change


# Merging


def test_merge__changes_go_deep_and_lists_are_replaced() -> None:
    base = {"a": {"b": {"c": 1, "d": [1, 2]}, "e": 2}, "f": 3}
    assert merged(base, {"a": {"b": {"d": [3]}}, "g": {"h": 1}}) == {
        "a": {"b": {"c": 1, "d": [3]}, "e": 2},
        "f": 3,
        "g": {"h": 1},
    }
    assert merged(base, {"a": 5}) == {"a": 5, "f": 3}
    assert base == {"a": {"b": {"c": 1, "d": [1, 2]}, "e": 2}, "f": 3}


@pytest.mark.parametrize("length", ["steps", "epochs", "images"])
def test_merge__a_length_replaces_that_of_the_recipe(length: str) -> None:
    spec = parse(own("cim-vit-s16-respix", training={length: 7}))
    training = resolve(spec)["training"]
    assert {key: training[key] for key in ("steps", "epochs", "images") if key in training} == {length: 7}
    assert training["batch_size"] == 2048
    assert training["warmup"] != {"epochs": 10.0}
    assert merged({"every": {"epochs": 1}}, {"every": {length: 7}}) == {"every": {length: 7}}


def test_merge__no_length_leaves_the_recipes() -> None:
    training = {"batch_size": 64, "steps": None}
    assert resolve(parse(own("cim-vit-s16-respix", training=training)))["training"]["epochs"] == 300


def test_expand__the_users_keys_win_and_nothing_is_changed_in_place() -> None:
    document = own("cim-vit-s16-respix", model={"objective": {"name": "revdet"}, "patch_size": 32})
    before = yaml.safe_dump(document)
    model = resolve(parse(document))["model"]
    assert (model["objective"]["name"], model["objective"]["weight"]) == ("revdet", 1.0)
    assert (model["patch_size"], model["image_size"]) == (32, 224)
    assert yaml.safe_dump(document) == before
    assert RECIPES["cim-vit-s16-respix"].spec["model"]["patch_size"] == 16


def test_expand__without_a_recipe_is_the_document() -> None:
    document = {"kind": "pretrain", "recipe": None}
    assert expand(document) == (document, None)


# Mistakes


def problems(*documents: Any) -> dict[str, str]:
    with pytest.raises(InvalidSpecError) as refused:
        parse_all(documents)
    return {error.path: error.message for error in refused.value.errors}


def test_mistake__an_unknown_recipe_names_the_nearest() -> None:
    told = problems(own("cim-vit-s16-repsix", nonsense=1))
    assert set(told) == {"recipe"}
    assert "cim-vit-s16-respix" in told["recipe"].split("nearest:")[1].split(", ")[0]
    assert all(name in problems(own("zzz"))["recipe"] for name in RECIPES)


@pytest.mark.parametrize("name", [3, ["cim-vit-s16-respix"], {"a": 1}, True, "", "x" * 10_000])
def test_mistake__what_is_no_name_at_all(name: Any) -> None:
    told = problems(own(name))
    assert set(told) == {"recipe"}
    assert len(told["recipe"]) < 1000


@pytest.mark.parametrize("kind", ["tokenizer", "evaluate", 5])
def test_mistake__a_recipe_for_another_kind(kind: Any) -> None:
    told = problems(own("cim-vit-s16-respix", kind=kind))
    assert set(told) == {"recipe"}
    assert "is for kind pretrain" in told["recipe"]


def test_mistake__in_what_was_changed_bears_its_path() -> None:
    changes = {"training": {"batchsize": 3}, "model": {"enhancer": {"name": "resnet18"}}}
    told = problems(own("tokenizer-64"), {**own("cim-vit-s16-respix", **changes), "name": "other"})
    assert set(told) == {"[1].training.batchsize", "[1].model.enhancer.shared_blocks"}


def test_mistake__what_the_user_must_give_is_asked_for() -> None:
    assert set(problems({"recipe": "tokenizer-64"})) == {"name", "data"}


# Over REST


async def test_rest__lists_and_shows(world: World) -> None:
    listed = (await world.client.get("/v1/recipes")).json()
    assert [one["name"] for one in listed] == sorted(RECIPES)
    keys = {"name", "kind", "method", "enhancer", "objective", "epochs", "description"}
    assert all(set(one) == keys for one in listed)
    assert {one["kind"]: one["method"] for one in listed} == {"pretrain": "CIM", "tokenizer": "tokenizer"}
    shown = (await world.client.get("/v1/recipes/cim-resnet50-revdet")).json()
    assert yaml.safe_load(shown["text"]) == shown["spec"]
    assert (shown["enhancer"], shown["objective"], shown["epochs"]) == ("resnet50", "revdet", 300)
    unknown = await world.client.get("/v1/recipes/cim-resnet50")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    assert "cim-resnet50-revdet" in unknown.json()["detail"]


async def test_rest__a_job_keeps_what_was_given_and_what_it_became(world: World) -> None:
    data = {"uri": str(world.images)}
    documents = [
        own("tokenizer-32", name="tokenizer-32", data=data),
        own("cim-vit-tiny-64-revdet", data=data, training={"steps": 3}),
    ]
    _, job = await world.submit(*documents)
    assert job["spec"] == documents[1]
    assert job["kind"] == "pretrain"
    assert job["resolved"]["recipe"] == "cim-vit-tiny-64-revdet"
    assert job["resolved"]["model"]["image_size"] == 64
    assert job["resolved"]["training"]["steps"] == 3
    assert (await world.refused(own("nothing")))["recipe"]
