"""Spec files, `--set` and paths."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from service.cli.specs import SpecFileError, load
from service.contracts.parsing import parse_all


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is not the spec's."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write(tmp_path: Path, text: str, *, name: str = "spec.yaml") -> str:
    path = tmp_path / "specs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def one(tmp_path: Path, text: str, *sets: str) -> dict[str, Any]:
    (spec,) = load(write(tmp_path, text), sets=sets)
    return spec


def test_file__documents_lists_and_json(tmp_path: Path) -> None:
    assert load(write(tmp_path, "---\na: 1\n---\n---\n- b: 2\n- c: 3\n")) == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert load(write(tmp_path, json.dumps([{"a": 1e-3}, {"b": None}]), name="s.json")) == [
        {"a": 0.001},
        {"b": None},
    ]
    assert load(write(tmp_path, '{"a": "x"}', name="s.json")) == [{"a": "x"}]


def test_file__standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("data: {uri: photos}\n"))
    assert load("-") == [{"data": {"uri": str(Path.cwd() / "photos")}}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5e-3", 0.0015),
        ("-2E5", -200000.0),
        ("1e+3", 1000.0),
        (".5", 0.5),
        ("7", 7),
        ("1e", "1e"),
        ("e3", "e3"),
        ("'1e-3'", "1e-3"),
        ("2026-01-02", "2026-01-02"),
        ("true", True),
        ("~", None),
    ],
)
def test_file__numbers_are_numbers_and_dates_text(tmp_path: Path, text: str, value: object) -> None:
    spec = one(tmp_path, f"x: {text}\n")
    assert spec == {"x": value}
    assert type(spec["x"]) is type(value)


def test_file__what_is_sent_for_a_learning_rate_parses_as_one(tmp_path: Path) -> None:
    text = """
kind: tokenizer
name: t
data: {uri: photos}
training: {steps: 10, batch_size: 4, learning_rate: 1e-3}
"""
    spec = one(tmp_path, text, "training.weight_decay=5e-2")
    (parsed,) = parse_all([json.loads(json.dumps(spec))])
    assert parsed.kind == "tokenizer"
    assert parsed.training.learning_rate == 0.001
    assert parsed.training.weight_decay == 0.05


@pytest.mark.parametrize(
    ("text", "lesson"),
    [
        ("x: 1\na: [1,", "line 2, column"),
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: the key 'a' comes twice"),
        ("m: {x: 1, x: 2}", "the key 'x' comes twice"),
        ("", "holds no spec"),
        ("---\n---\n", "holds no spec"),
        ("just text", "a spec is a mapping of keys to values, got 'just text'"),
        ("- 3", "a spec is a mapping"),
        ("a: !!binary aGk=", "JSON"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: &x [*x]", "JSON"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("? {a: 1}\n: 3", "not valid YAML"),
    ],
)
def test_file__mistakes_are_told(tmp_path: Path, text: str, lesson: str) -> None:
    with pytest.raises(SpecFileError, match=lesson):
        one(tmp_path, text)


def test_file__that_is_missing_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecFileError, match=r"nowhere\.yaml: No such file"):
        load("nowhere.yaml")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(SpecFileError, match="UTF-8"):
        load(str(tmp_path / "picture.png"))


def test_file__merge_keys_still_work(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n"
    assert one(tmp_path, text)["other"] == {"a": 1, "b": 3}


# --set


def test_set__changes_and_makes_keys(tmp_path: Path) -> None:
    text = "name: x\ntraining: {epochs: 3}\nprobe:\ntasks: [knn, {name: knn, k: 5}]\n"
    sets = (
        "training.epochs=1",
        "model.enhancer.name=resnet18",
        "probe.every={steps: 5}",
        "tasks.1.k=7",
        "tasks.0=a=b",
    )
    assert one(tmp_path, text, *sets) == {
        "name": "x",
        "training": {"epochs": 1},
        "probe": {"every": {"steps": 5}},
        "tasks": ["a=b", {"name": "knn", "k": 7}],
        "model": {"enhancer": {"name": "resnet18"}},
    }


@pytest.mark.parametrize(
    "word", ["1e999", "-1e400", ".inf", "-.INF", ".nan", "9" * 5000, "0x" + "f" * 5000, "0b_"]
)
def test_load__a_number_that_json_cannot_carry_is_sent_as_written(tmp_path: Path, word: str) -> None:
    """The service names its place, among all other mistakes of the spec."""
    (spec,) = load(write(tmp_path, f"training: {{weight_decay: {word}}}"), sets=[f"training.epochs={word}"])
    assert spec["training"] == {"weight_decay": word, "epochs": word}


@pytest.mark.parametrize(("word", "number"), [("1e300", 1e300), ("0x10", 16), ("-7", -7), ("1_000", 1000)])
def test_load__other_numbers_are_numbers(tmp_path: Path, word: str, number: float) -> None:
    (spec,) = load(write(tmp_path, f"training: {{weight_decay: {word}}}"))
    assert spec["training"]["weight_decay"] == number
    assert type(spec["training"]["weight_decay"]) is type(number)


def test_set__values_are_yaml(tmp_path: Path) -> None:
    sets = ("a=1e-3", "b=[1, 2]", "c=", "d='1'", "e=text with = in it", "f=false")
    spec = one(tmp_path, "name: x", *sets)
    del spec["name"]
    assert spec == {"a": 0.001, "b": [1, 2], "c": None, "d": "1", "e": "text with = in it", "f": False}


def test_set__every_document_or_the_one_of_that_name(tmp_path: Path) -> None:
    file = write(tmp_path, "name: a.b\n---\nname: c\n")
    assert load(file, sets=["x.y=1", "a.b:z=2", "c:labels.t=v"]) == [
        {"name": "a.b", "x": {"y": 1}, "z": 2},
        {"name": "c", "x": {"y": 1}, "labels": {"t": "v"}},
    ]


@pytest.mark.parametrize(
    ("assignment", "lesson"),
    [
        ("training.epochs", "a.b=VALUE"),
        ("=3", "a.b=VALUE"),
        ("a..b=3", "a.b=VALUE"),
        (".a=3", "a.b=VALUE"),
        ("a=[1", "not valid YAML"),
        ("name.x=3", "name is 'x' and has no 'x' inside"),
        ("name.x.y=3", "name is 'x' and has no 'x' inside"),
        ("tasks.2.k=3", "tasks is a list of 1; '2' must be 0 to 0"),
        ("tasks.k=3", "tasks is a list of 1; 'k' must be"),
        ("other:a=3", "no spec is called 'other'; there is x"),
    ],
)
def test_set__mistakes_are_told(tmp_path: Path, assignment: str, lesson: str) -> None:
    with pytest.raises(SpecFileError, match=lesson):
        one(tmp_path, "name: x\ntasks: [{}]\n", assignment)


# Paths


def test_paths__in_the_file_are_meant_from_its_folder(tmp_path: Path) -> None:
    text = """
data: {uri: photos/, train: ./a.tar, val: ../b/*.tar}
probe: {train: p, val: q}
model: {tokenizer: {source: ./tok}}
encoder: runs/encoder
"""
    folder = tmp_path / "specs"
    assert one(tmp_path, text) == {
        "data": {
            "uri": str(folder / "photos"),
            "train": str(folder / "a.tar"),
            "val": str(tmp_path / "b/*.tar"),
        },
        "probe": {"train": str(folder / "p"), "val": str(folder / "q")},
        "model": {"tokenizer": {"source": str(folder / "tok")}},
        "encoder": str(folder / "runs/encoder"),
    }


def test_paths__of_openais_files_are_meant_from_the_spec_too(tmp_path: Path) -> None:
    text = "model: {tokenizer: {source: dall-e, encoder: encoder.pkl, decoder: 'https://example.org/d.pkl'}}"
    assert one(tmp_path, text)["model"]["tokenizer"] == {
        "source": "dall-e",
        "encoder": str(tmp_path / "specs" / "encoder.pkl"),
        "decoder": "https://example.org/d.pkl",
    }


def test_paths__in_set_are_meant_from_the_working_folder(tmp_path: Path) -> None:
    spec = one(tmp_path, "data: {uri: photos}", "data.uri=pictures", "encoder=./e")
    assert spec == {"data": {"uri": str(Path.cwd() / "pictures")}, "encoder": str(Path.cwd() / "e")}


def test_paths__of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    assert one(tmp_path, "data: {uri: ~/photos}")["data"]["uri"] == "/elsewhere/photos"


@pytest.mark.parametrize("value", ["/abs/x", "s3://bucket/photos/", "job:street", "https://host/x.tar", ""])
def test_paths__other_addresses_stay(tmp_path: Path, value: str) -> None:
    spec = one(tmp_path, f"data: {{uri: '{value}'}}\nencoder: '{value}'")
    assert spec == {"data": {"uri": value}, "encoder": value}


def test_paths__words_stay_words_unless_such_a_folder_exists(tmp_path: Path) -> None:
    text = "model: {tokenizer: {source: fake}}\nencoder: random"
    assert one(tmp_path, text) == {"model": {"tokenizer": {"source": "fake"}}, "encoder": "random"}
    (tmp_path / "specs" / "mine").mkdir()
    assert one(tmp_path, "encoder: mine") == {"encoder": str(tmp_path / "specs" / "mine")}


def test_paths__wrong_shapes_are_left_to_the_service(tmp_path: Path) -> None:
    text = "data: 3\nprobe: [a]\nmodel: {tokenizer: text}\nencoder: {x: 1}"
    assert one(tmp_path, text) == {
        "data": 3,
        "probe": ["a"],
        "model": {"tokenizer": "text"},
        "encoder": {"x": 1},
    }
