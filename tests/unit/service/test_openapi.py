"""The OpenAPI document is a file of the repository: a change of the wire is seen in review."""

import json
from pathlib import Path
from typing import Any

from service.api.routes.examples import SPECS
from service.contracts.parsing import parse_all
from tests.fakes.world import World

GOLDEN = Path(__file__).parents[2] / "golden" / "openapi.json"
REGENERATE = "python -m scripts.write_openapi"


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


async def test_openapi__is_the_committed_document(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    assert document == json.loads(GOLDEN.read_text(encoding="utf-8")), f"if it was meant, run `{REGENERATE}`"


async def test_openapi__every_operation_says_what_it_does(world: World) -> None:
    document = (await world.client.get("/openapi.json")).json()
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["description"], name
        assert operation["tags"], name
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert set(answer.get("content", {})) <= {"application/problem+json"}, name


async def test_docs__need_no_network(world: World) -> None:
    page = await world.client.get("/docs")
    assert page.status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/assets/{asset}" in page.text
        assert (await world.client.get(f"/docs/assets/{asset}")).status_code == 200
    first = await world.client.get("/")
    assert (first.status_code, first.headers["location"]) == (307, "/docs")


def test_examples__are_sound_specs() -> None:
    for example in SPECS.values():
        value = example["value"]
        assert parse_all(value if isinstance(value, list) else [value])
