"""Every mistake in a spec is told, at its dotted path, with the value and what to do."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contracts.parsing import examine, parse, parse_all
from service.contracts.spec_keys import MODELS, dotted, known_keys
from service.contracts.specs import PretrainSpec
from service.errors import InvalidSpecError

Document = dict[str, Any]


def pretrain(**changes: Any) -> Document:
    """A sound spec with values put at dotted paths (`__` for a dot); `...` takes a key out."""
    spec: Document = {
        "kind": "pretrain",
        "name": "enc",
        "data": {"uri": "/data"},
        "model": {
            "tokenizer": {"source": "job:tok"},
            "enhancer": {"name": "vit_tiny_patch16_224"},
            "objective": {"name": "respix"},
        },
        "training": {"epochs": 3},
    }
    for path, value in changes.items():
        *above, key = path.split("__")
        inner = spec
        for part in above:
            inner = inner.setdefault(part, {})
        if value is ...:
            del inner[key]
        else:
            inner[key] = value
    return spec


def peer(method: str = "mae", **changes: Any) -> Document:
    """A sound spec of a peer of CIM."""
    source = {"source": "job:tok"} if method == "beit" else ...
    spec = pretrain(model__method=method, model__objective=..., model__tokenizer=source)
    for path, value in changes.items():
        spec["model"][path] = value
    return spec


def evaluate(**changes: Any) -> Document:
    data = {"train": "/a", "val": "/b"}
    return {"kind": "evaluate", "name": "ev", "encoder": "job:enc", "data": data, **changes}


def problems(raw: object) -> dict[str, str]:
    """Path and message of each mistake; the spec must have one."""
    with pytest.raises(InvalidSpecError) as refused:
        parse(raw)
    return {error.path: error.message for error in refused.value.errors}


# Spec, path of the one mistake, what its message must say.
MISTAKES: Mapping[str, tuple[Document, str, tuple[str, ...]]] = {
    "unknown key": (
        pretrain(training__batchsize=3),
        "training.batchsize",
        ("did you mean training.batch_size",),
    ),
    "key of another section": (
        pretrain(learning_rate=1),
        "learning_rate",
        ("belongs at training.learning_rate",),
    ),
    "nothing like it": (pretrain(model__zebra=1), "model.zebra", ("known keys here:", "patch_size")),
    "wrong type": (pretrain(training__batch_size="many"), "training.batch_size", ("integer", "'many'")),
    "yes for a number": (pretrain(training__batch_size=True), "training.batch_size", ("number", "True")),
    "impossible value": (
        pretrain(model__masking={"min_ratio": -0.4}),
        "model.masking.min_ratio",
        ("between 0.0 and 1.0", "-0.4"),
    ),
    "missing section": (pretrain(data=...), "data", ("is required", "uri")),
    "missing key": (pretrain(model__tokenizer={}), "model.tokenizer.source", ("is required", "job:NAME")),
    "no tokenizer": (pretrain(model__tokenizer=...), "model.tokenizer", ("is required", "job:my-tokenizer")),
    "no objective": (pretrain(model__objective=None), "model.objective", ("is required", "{name: respix}")),
    "beit without tokenizer": (peer("beit", tokenizer=None), "model.tokenizer", ("is required",)),
    "no such method": (peer("meae"), "model.method", ("'mae'", "'meae'")),
    "an objective for a peer": (
        peer(objective={"name": "respix"}),
        "model.objective",
        ("belongs to method cim alone, not to mae: leave it out",),
    ),
    "a generator for a peer": (peer(generator={"depth": 2}), "model.generator", ("method cim alone",)),
    "a tokenizer for mae": (peer(tokenizer={"source": "fake"}), "model.tokenizer", ("cim and beit alone",)),
    "a decoder for simmim": (peer("simmim", decoder={}), "model.decoder", ("method mae alone",)),
    "heads of a decoder": (peer(decoder={"heads": 7}), "model.decoder.heads", ("divide the width 512", "7")),
    "uneven masks for mae": (
        peer(masking={"min_ratio": 0.5}),
        "model.masking.max_ratio",
        ("equal masking.min_ratio", "0.5 and 0.75"),
    ),
    "a ratio above the method's": (
        pretrain(model__masking={"min_ratio": 0.7}),
        "model.masking.max_ratio",
        ("must not be below masking.min_ratio", "0.7 and 0.61"),
    ),
    "a unit of one and a half patches": (
        peer("simmim", masking={"unit": 24}),
        "model.masking.unit",
        ("multiple of patch_size 16", "24"),
    ),
    "a CNN for a peer": (
        peer(enhancer={"name": "resnet18"}),
        "model.enhancer.name",
        ("plain ViT of timm for method mae", "'resnet18'"),
    ),
    "a list for a section": (pretrain(data=["/data"]), "data", ("mapping",)),
    "no length": (pretrain(training__epochs=...), "training.epochs", ("exactly one of",)),
    "two lengths": (pretrain(training__steps=5), "training.epochs", ("exactly one of", "epochs and steps")),
    "not finite": (pretrain(training__weight_decay=float("inf")), "training.weight_decay", ("finite",)),
    "NUL": (pretrain(labels={"a": "b\x00"}), "labels.a", ("printable",)),
    "half a character": (pretrain(data__uri="/data/\ud800"), "data.uri", ("printable",)),
    "misspelt choice": (
        pretrain(model__objective__name="repsix"),
        "model.objective.name",
        ("did you mean respix", "'repsix'"),
    ),
    "a name with spaces": (pretrain(name="my job"), "name", ("pattern", "'my job'")),
    "unknown timm name": (
        pretrain(model__enhancer__name="vit_tinny_patch16_224"),
        "model.enhancer.name",
        ("vit_tiny_patch16_224",),
    ),
    "a timm name with weights": (
        pretrain(model__enhancer__name="vit_tiny_patch16_224.augreg_in21k"),
        "model.enhancer.name",
        ("without a tag", "vit_tiny_patch16_224"),
    ),
    "sharing asked of a CNN": (
        pretrain(model__enhancer={"name": "resnet18", "shared_blocks": 2}),
        "model.enhancer.shared_blocks",
        ("must be 0 for resnet18", "2"),
    ),
    "more shared than there are": (
        pretrain(model__enhancer__shared_blocks=6),
        "model.generator.depth",
        ("6 blocks",),
    ),
    "shared with another width": (
        pretrain(model__enhancer__shared_blocks=2, model__generator={"width": 100}),
        "model.generator.width",
        ("192", "100"),
    ),
    "shared with other heads": (
        pretrain(model__enhancer__shared_blocks=2, model__generator={"heads": 2}),
        "model.generator.heads",
        ("enhancer's 3", "2"),
    ),
    "heads that do not divide": (
        pretrain(model__enhancer__shared_blocks=0, model__generator={"heads": 5}),
        "model.generator.heads",
        ("divide", "192"),
    ),
    "relative positions and sharing": (
        pretrain(model__enhancer__shared_blocks=1, model__generator={"positions": "relative"}),
        "model.generator.positions",
        ("absolute", "relative"),
    ),
    "patches that do not tile": (
        pretrain(model__objective={"name": "respix", "normalise": "patch", "window": 9}),
        "model.objective.window",
        ("divide image_size 224", "9"),
    ),
    "recomputation that timm lacks": (
        pretrain(model__enhancer={"name": "dla34", "grad_checkpointing": True}),
        "model.enhancer.grad_checkpointing",
        ("false for dla34", "timm has no gradient checkpointing"),
    ),
    "image size and patch": (
        pretrain(model__image_size=100),
        "model.image_size",
        ("multiple of patch_size 16", "100"),
    ),
    "batch and workers": (
        pretrain(training__batch_size=10, resources={"workers": 3}),
        "training.batch_size",
        ("resources.workers x training.accumulation = 3", "12"),
    ),
    "warm-up too long": (
        pretrain(training__warmup={"epochs": 4}),
        "training.warmup.epochs",
        ("3 epochs", "4"),
    ),
    "option of two types": (
        pretrain(model__enhancer__options={"depth": [1]}),
        "model.enhancer.options.depth",
        ("[1]",),
    ),
    "our own option": (
        pretrain(model__enhancer__options={"img_size": 32}),
        "model.enhancer.options",
        ("img_size",),
    ),
    "unknown kind": (pretrain(kind="pretran"), "kind", ("did you mean pretrain",)),
    "no kind": (pretrain(kind=...), "kind", ("is required",)),
    "sweep": (pretrain(kind="sweep"), "kind", ("not available in this version",)),
    "random encoder": (evaluate(encoder="random"), "encoder", ("compare_random",)),
    "task of later": (evaluate(tasks=["linear"]), "tasks[0]", ("'knn'", "'linear'")),
    "task's value": (
        evaluate(tasks=[{"name": "knn", "k": 0}]),
        "tasks[0].k",
        ("greater than or equal to 1", "0"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parse__one_mistake_is_told_once_and_nothing_else(name: str) -> None:
    spec, path, words = MISTAKES[name]
    found = problems(spec)
    assert set(found) == {path}
    assert all(word in found[path] for word in words), found[path]


@pytest.mark.parametrize("raw", [None, [], "text", 3, b"bytes", [[[]]]])
def test_parse__no_mapping_is_told_so(raw: object) -> None:
    assert "mapping of keys to values" in problems(raw)["spec"]


def test_parse__nesting_without_end_is_refused() -> None:
    raw: Any = {}
    for _ in range(100_000):
        raw = {"a": raw} if len(raw) % 2 else {"b": [raw]}
    assert "nested" in problems(raw)["spec"]


def test_parse__all_mistakes_at_once() -> None:
    spec = pretrain(
        priorty=1,
        training__batch_size="many",
        model__masking={"min_ratio": 1.4, "max_ratio": 1.5},
        model__image_size=100,
        model__enhancer__name="nothing_like_it_at_all",
        resources={"workers": 0},
        labels={"ok": "\x00"},
    )
    paths = {"priorty", "training.batch_size", "model.masking.min_ratio", "model.image_size", "labels.ok"}
    assert set(problems(spec)) >= paths | {"resources.workers"}


def test_parse__what_a_method_needs_is_asked_for_beside_other_mistakes() -> None:
    missing = {"model.tokenizer", "model.enhancer", "model.objective"}
    assert set(problems(pretrain(model={}))) == missing
    assert set(problems(pretrain(model={"enhancer": 5}))) == missing
    assert set(problems(pretrain(model={"method": "beit"}))) == {"model.tokenizer", "model.enhancer"}
    assert set(problems(pretrain(model={"method": "mae", "enhancer": {}}))) == {"model.enhancer.name"}
    assert set(problems(pretrain(model={"method": ["mae"]}))) == {"model.method", "model.enhancer"}


def test_parse__peers_are_sound_with_what_they_need() -> None:
    for method in ("beit", "simmim", "mae"):
        spec = parse(peer(method))
        assert isinstance(spec, PretrainSpec)
        assert spec.model.method == method


def test_parse__no_rule_is_judged_with_a_default_in_the_place_of_a_mistake() -> None:
    # 100 is no multiple of the default patch of 16, but 16 is not what was asked for.
    assert set(problems(pretrain(model__patch_size="ten", model__image_size=100))) == {"model.patch_size"}
    spec = pretrain(training__batch_size=10, resources={"workers": "three"})
    assert set(problems(spec)) == {"resources.workers"}


def test_parse__a_long_value_is_cut() -> None:
    with pytest.raises(InvalidSpecError) as refused:
        parse(pretrain(training__batch_size="9" * 100_000))
    (problem,) = refused.value.errors
    assert len(problem.message) < 500
    assert len(str(problem.value)) < 500


def test_parse_all__paths_begin_with_the_document_where_there_are_several() -> None:
    with pytest.raises(InvalidSpecError) as refused:
        parse_all([pretrain(), evaluate(encoder="random"), 3])
    assert [error.path for error in refused.value.errors] == ["[1].encoder", "[2]"]
    with pytest.raises(InvalidSpecError) as alone:
        parse_all([evaluate(encoder="random")])
    assert [error.path for error in alone.value.errors] == ["encoder"]


def test_known_keys__are_those_of_the_models() -> None:
    assert known_keys("pretrain", ()) == sorted(MODELS["pretrain"].model_fields)
    assert "quantiser" in known_keys("tokenizer", ("model",))
    assert "name" in known_keys("evaluate", ("tasks", 0))
    assert known_keys("pretrain", ("labels",)) == []


def test_dotted__puts_numbers_into_brackets() -> None:
    assert dotted(("tasks", 0, "k")) == "tasks[0].k"


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    value=json, path=st.sampled_from(["name", "data", "model", "training", "resources", "labels", "priority"])
)
def test_parse__never_anything_but_a_spec_or_a_list_of_mistakes(value: object, path: str) -> None:
    for spec in (pretrain(**{path: value}), evaluate(**{path: value}), value):
        made, mistakes = examine(spec)
        assert made is not None or mistakes
        assert all(problem.message for problem in mistakes)
