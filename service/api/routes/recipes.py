"""HTTP for recipes."""

from typing import Annotated, Any

from fastapi import APIRouter, Path

from service.contracts.problems import Problem
from service.contracts.recipes import Recipe, RecipeSummary, known_recipes, nearest_recipes
from service.errors import NotFoundError

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such recipe."}}

router = APIRouter(prefix="/v1/recipes", tags=["recipes"])


@router.get("", summary="List recipes")
async def list_recipes() -> list[RecipeSummary]:
    """Every recipe that comes with the service. `recipe: NAME` in a spec builds on one."""
    return [RecipeSummary.model_validate(recipe.model_dump()) for recipe in known_recipes().values()]


@router.get("/{name}", summary="Show a recipe", responses=UNKNOWN)
async def show_recipe(name: Annotated[str, Path(description="As the list names it.")]) -> Recipe:
    """One recipe: the file with its comments, which say where each number comes from, and as a document."""
    recipe = known_recipes().get(name)
    if recipe is None:
        raise NotFoundError(f"no recipe is called {name!r}; {nearest_recipes(name)}")
    return recipe
