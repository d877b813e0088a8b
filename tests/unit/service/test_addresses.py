"""Secrets in addresses: found in every key that may hold one, and never repeated."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cim_core.config import DALL_E, TokenizerSource
from service.contracts.addresses import images_of, models_of, official_files_of, redacted
from service.contracts.parsing import parse
from service.contracts.spec_keys import MODELS
from service.db.tables import JobRow
from service.errors import InvalidSpecError
from tests.fakes.world import World
from tests.unit.service.test_parsing import evaluate, pretrain

SECRETS = [
    "s3://AKIAKEY:HIDDEN@bucket/photos/",
    "s3://AKIAKEY:HIDDEN/with/slashes+HIDDEN@bucket/photos/",
    "s3://HIDDEN@bucket/photos/",
    "https://user:HIDDEN@example.org/encoder.pkl",
    "https://HIDDEN@example.org/encoder.pkl",
    "https://HIDDEN@example.org:8443/encoder.pkl",
    "https://user:HIDDEN%40x@example.org:8443/encoder.pkl",
    "https://user:HIDDEN%40example.org/encoder.pkl",
    "https://user:HIDDEN/x@example.org/encoder.pkl",
    "gs://user:HIDDEN@bucket/a",
    "https://bucket.s3.amazonaws.com/k?X-Amz-Credential=HIDDEN&X-Amz-Signature=HIDDEN",
    "s3://bucket/photos/?X-Amz-Security-Token=HIDDEN",
    "https://example.org/encoder.pkl?a=b&token=HIDDEN",
    "https://example.org/encoder.pkl?TOKEN=HIDDEN",
    "https://example.org/encoder.pkl?%74oken=HIDDEN",
    "https://example.org/encoder.pkl?%2574oken=HIDDEN",
    "https://example.org/encoder.pkl?access_token=HIDDEN",
    "https://example.org/encoder.pkl;api-key=HIDDEN",
    "https://example.org/encoder.pkl?apiKey=HIDDEN",
    "https://example.org/encoder.pkl#password=HIDDEN",
    "https://account.blob.core.windows.net/c/b?sv=2024&sig=HIDDEN",
    "https://storage.googleapis.com/b/o?GoogleAccessId=x&Signature=HIDDEN",
    "https://d.cloudfront.net/x?Policy=x&Key-Pair-Id=HIDDEN&Signature=HIDDEN",
]
HARMLESS = [
    "/data/user:name@host/photos",
    "/data/a?token=b",
    "s3://bucket/mail@example.org/photos",
    "s3://bucket/photos/?versionId=3",
    "https://example.org:8443/npm/model@1.0/encoder.pkl",
    "https://example.org/encoder.pkl?download=true&keyboard=no",
    "job:token",
]


def refused(spec: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidSpecError) as caught:
        parse(spec)
    assert "HIDDEN" not in repr([error.model_dump() for error in caught.value.errors])
    assert "HIDDEN" not in str(caught.value)
    return {error.path: error.message for error in caught.value.errors}


def with_address(path: str, address: str) -> dict[str, Any]:
    """A spec, sound but for this."""
    if path.startswith("probe"):
        probe = {"train": "/a", "val": "/b", "every": {"epochs": 1}}
        return pretrain(probe={**probe, path.removeprefix("probe."): address})
    if path in ("data.train", "data.val"):
        return evaluate(data={"train": "/a", "val": "/b", path.removeprefix("data."): address})
    if path == "encoder":
        return evaluate(encoder=address)
    if path == "data.uri":
        return pretrain(data__uri=address)
    source = {"source": DALL_E} if path != "model.tokenizer.source" else {}
    return pretrain(model__tokenizer={**source, path.rpartition(".")[2]: address})


PLACES = [
    "data.uri",
    "data.train",
    "data.val",
    "probe.train",
    "probe.val",
    "encoder",
    "model.tokenizer.source",
    "model.tokenizer.encoder",
    "model.tokenizer.decoder",
]


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("address", SECRETS)
def test_secret__is_refused_in_every_key_and_not_repeated(path: str, address: str) -> None:
    problems = refused(with_address(path, address))
    assert set(problems) == {path}
    assert "specs are kept, shown and logged" in problems[path]


@pytest.mark.parametrize("address", HARMLESS)
@pytest.mark.parametrize("path", ["data.uri", "model.tokenizer.decoder"])
def test_secret__what_only_looks_like_one_is_taken(path: str, address: str) -> None:
    parse(with_address(path, address))


def test_places__are_all_keys_that_may_hold_an_address() -> None:
    """Whoever adds an address to the spec finds this red, and adds it to what `uris.problems` reads."""
    found = set().union(*(set(_addresses_in(model, ())) for model in MODELS.values()))
    assert found == set(PLACES)
    specs = [parse(with_address(path, "/x")) for path in PLACES]
    lists = (images_of, models_of, official_files_of)
    assert {path for spec in specs for listed in lists for path, _ in listed(spec)} == set(PLACES)


def _addresses_in(model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _addresses_in(kind, (*place, name))
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                inner = {f.name: f.type for f in dataclasses.fields(kind)}
                yield from (
                    ".".join((*place, name, deep, key))
                    for deep, type_ in inner.items()
                    if TokenizerSource in (type_, *get_args(type_))
                    for key in ("source", "encoder", "decoder")
                )
        if any(getattr(rule, "max_length", None) == 4096 for rule in field.metadata):
            yield ".".join((*place, name))


def test_problem__a_secret_in_a_mistaken_key_is_not_repeated() -> None:
    """Not in the right place, so no rule for addresses applies; it is echoed by others."""
    for spec in (
        pretrain(data={"url": "s3://AKIA:HIDDEN@bucket/x"}),
        pretrain(data="s3://AKIA:HIDDEN@bucket/x"),
        pretrain(data__uri=["s3://AKIA:HIDDEN@bucket/x"]),
        pretrain(data__uri={"a": "https://example.org/x?sig=HIDDEN"}),
        pretrain(data__uri="s3://AKIA:HIDDEN@" + "b" * 5000),
        pretrain(training__epochs="https://user:HIDDEN@example.org/"),
        {"kind": "https://user:HIDDEN@example.org/"},
    ):
        assert refused(spec)


KEY = "AKIA" + "HIDDEN0123456789"[:16]
TEXTS = [
    SECRETS[0],
    "https://me:HIDDEN@host/?token=abc",
    "https://host/?token=HIDDEN",
    "taken from https://me:HIDDEN@host/x on Monday",
    "src=https://me:HIDDEN@host/x",
    "see https://example.org/a, s3://HIDDEN@bucket/x",
    "https%3A%2F%2Fme%3AHIDDEN%40host",
    KEY,
    f"key {KEY.replace('AKIA', 'ASIA')}!",
    f"s3://bucket/{KEY}/x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secret__is_refused_in_a_label_and_not_repeated(text: str) -> None:
    problems = refused(pretrain(labels={"team": "vision", "src": text}))
    assert set(problems) == {"labels.src"}
    assert "specs are kept, shown and logged" in problems["labels.src"]


def test_secret__is_refused_in_a_name_and_in_a_labels_name() -> None:
    assert set(refused(pretrain(name=KEY))) == {"name"}
    assert set(refused(pretrain(labels={KEY: "x"}))) == {"labels.***"}
    assert set(refused(pretrain(labels={"https://me:HIDDEN@host": "x"}))) == {"labels.https://***@host"}


def test_secret__is_refused_wherever_a_spec_takes_text() -> None:
    options = {"depth": 3, "weights": "https://me:HIDDEN@host/x"}
    problems = refused(pretrain(model__enhancer={"name": "vit_small_patch16_224", "options": options}))
    assert set(problems) == {"model.enhancer.options.weights"}


@pytest.mark.parametrize(
    "text", [*HARMLESS, "ticket 12: see https://example.org/a?page=2", "AKIA", f"{KEY}0", f"x{KEY}"]
)
def test_secret__a_label_that_only_looks_like_one_is_taken(text: str) -> None:
    parse(pretrain(labels={"src": text}))


async def test_patch__a_secret_is_refused_and_neither_stored_nor_shown(world: World) -> None:
    (job,) = await world.submit(world.tokenizer("tok", labels={"team": "vision"}))
    address = f"/v1/jobs/{job['id']}"
    changes: list[dict[str, Any]] = [{"labels": {"src": text}} for text in TEXTS] + [
        {"name": KEY},
        {"labels": {KEY: "x"}},
        {"labels": {"src": TEXTS[1] + "x" * 300}},
    ]
    for change in changes:
        answer = await world.client.patch(address, json=change)
        assert answer.status_code == 422, change
        assert "HIDDEN" not in answer.text
    shown = await world.show("tok")
    assert (shown["name"], shown["labels"]) == ("tok", {"team": "vision"})
    assert "HIDDEN" not in (await world.client.get(f"{address}/events")).text


async def test_patch__labels_of_an_earlier_release_are_not_repeated_in_the_event(world: World) -> None:
    (job,) = await world.submit(world.tokenizer("tok"))
    async with world.sessions.begin() as session:
        (await session.get_one(JobRow, job["id"])).labels = {"src": TEXTS[1], "key": KEY}
    answer = await world.client.patch(f"/v1/jobs/{job['id']}", json={"labels": {"team": "vision"}})
    assert answer.json()["labels"] == {"team": "vision"}
    events = (await world.client.get(f"/v1/jobs/{job['id']}/events")).text
    assert "vision" in events
    assert "HIDDEN" not in events


async def test_submit__neither_answer_nor_events_hold_it(world: World) -> None:
    document = world.tokenizer(data={"uri": "s3://AKIAKEY:HIDDEN@bucket/photos/"})
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        answer = await world.client.post(path, json=document)
        assert answer.status_code == 422
        assert "data.uri" in answer.text
        assert "HIDDEN" not in answer.text
    assert (await world.client.get("/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got 's3://K:S/e+c@b/x' and 'https://u@h/?a=b'", "got 's3://***@b/x' and 'https://***@h/?a=***'"),
        ("https://h:80/x@1/y", "https://h:80/x@1/y"),
        ("me:pw@host/path", "***@host/path"),
        ("/data/plain", "/data/plain"),
        ("id AKIA0123456789ABCDEF, xAKIA0123456789ABCDEF", "id ***, xAKIA0123456789ABCDEF"),
    ],
)
def test_redacted__by_hand(text: str, shown: str) -> None:
    assert redacted(text) == shown
