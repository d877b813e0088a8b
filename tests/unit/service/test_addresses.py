"""Secrets in addresses: found in every key that may hold one, and never repeated."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cim_core.config import DALL_E, TokenizerSource
from service.contracts.addresses import addresses_of, redacted
from service.contracts.parsing import parse
from service.contracts.spec_keys import MODELS
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
    """Whoever adds an address to the spec finds this red, and adds it to `addresses_of`."""
    found = set().union(*(set(_addresses_in(model, ())) for model in MODELS.values()))
    assert found == set(PLACES)
    specs = [with_address(path, "/x") for path in PLACES]
    assert {path for spec in specs for path, _ in addresses_of(parse(spec))} == set(PLACES)


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
    ],
)
def test_redacted__by_hand(text: str, shown: str) -> None:
    assert redacted(text) == shown
