"""Recipes: specs that come with the service, and how a user's spec builds on one.

Each is a YAML file of `service/recipes`. Its first comment says what it is.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field

from service.contracts.base import Stored
from service.contracts.problems import FieldProblem

METHODS = {"cim": "CIM", "beit": "BEiT", "simmim": "SimMIM", "mae": "MAE"}
# Of these one alone says how long something lasts, so giving another one replaces it.
_LENGTHS = ("steps", "epochs", "images")


class RecipeSummary(Stored):
    """One line of the list of recipes."""

    name: str
    kind: str
    method: str = Field(
        description="CIM (corrupted image modeling), a peer of it, or the training of a tokenizer."
    )
    enhancer: str | None = None
    objective: str | None = None
    epochs: float | None = None
    description: str


class Recipe(RecipeSummary):
    """A recipe, with the reason of each number."""

    text: str = Field(description="The YAML file, comments and all.")
    spec: dict[str, Any] = Field(description="The same as a document; name and data are the user's.")


@cache
def known_recipes() -> Mapping[str, Recipe]:
    """Every recipe by its name."""
    folder = files("service.recipes")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    recipes = [_read(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in names]
    return {recipe.name: recipe for recipe in recipes}


def nearest_recipes(name: str) -> str:
    """What to say about recipes to someone who gave an unknown name."""
    known = list(known_recipes())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"the nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"


def expand(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], FieldProblem | None]:
    """The document put upon the recipe that it names, or what is wrong with that name.

    Doing it again changes nothing: what the recipe says is below what the document says.
    """
    name = document.get("recipe")
    if name is None:
        return document, None
    recipe = known_recipes().get(name) if isinstance(name, str) else None
    if recipe is None:
        shown = repr(name)[:100]
        told = f"must be the name of a recipe, got {shown}; {nearest_recipes(shown)}"
        return document, FieldProblem(path="recipe", message=told, value=shown)
    kind = document.get("kind", recipe.kind)
    if kind != recipe.kind:
        told = f"{name} is for kind {recipe.kind}, but this spec is of kind {kind!r}; drop one of the two"
        return document, FieldProblem(path="recipe", message=told, value=name)
    return merged(recipe.spec, document), None


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` changed: mappings are merged at every depth, everything else is replaced."""
    if any(changes.get(key) is not None for key in _LENGTHS):
        base = {key: value for key, value in base.items() if key not in _LENGTHS}
    return {**base, **{key: _changed(base.get(key), value) for key, value in changes.items()}}


def _changed(old: Any, new: Any) -> Any:
    return merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new


def _read(file_name: str, text: str) -> Recipe:
    spec = yaml.safe_load(text)
    model = spec.get("model", {})
    return Recipe(
        name=file_name.removesuffix(".yaml"),
        kind=spec["kind"],
        method=METHODS[model.get("method", "cim")] if spec["kind"] == "pretrain" else spec["kind"],
        enhancer=model.get("enhancer", {}).get("name"),
        objective=model.get("objective", {}).get("name"),
        epochs=spec["training"].get("epochs"),
        description=text.splitlines()[0].removeprefix("# "),
        text=text,
        spec=spec,
    )
