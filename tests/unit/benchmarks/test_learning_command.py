"""The command that compares methods, as a whole: small runs, done once, and their report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import __main__ as command
from benchmarks.learning import runs
from benchmarks.learning.cases import CASES, RESPIX_WIDE, Case, model_config
from benchmarks.learning.report import MORE_PROBES
from benchmarks.records import read
from cim_core.config import ModelConfig
from cim_core.tokenizers.store import load_tokenizer
from tests.unit.cim_core.tiny import write_images

METHODS = ["pixels", "tokenizer-features", "random", "cim-revdet", "mae-long", "resnet18-cim-respix"]


def test_command__set_needs_a_label(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--label"):
        command.main(["--train", "a", "--val", "b", "--set", "model.objective.weight=10"])


def rates_of(monkeypatch: pytest.MonkeyPatch, name: str, *, place: int) -> list[float]:
    """The peak learning rate of each call of `name` in runs, whose training is its argument `place`."""
    real, seen = getattr(runs, name), list[float]()

    def called(*words: Any, **options: Any) -> Any:
        seen.append(words[place].learning_rate)
        return real(*words, **options)

    monkeypatch.setattr(runs, name, called)
    return seen


@pytest.mark.slow
def test_command__small_run_is_done_once_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_at = rates_of(monkeypatch, "train", place=3)
    finetuned_at = rates_of(monkeypatch, "finetuned", place=3)
    folder = str(write_images(tmp_path / "images", count=24, side=40))
    out = tmp_path / "results.jsonl"
    words = ["--train", folder, "--val", folder, "--out", str(out), "--seconds", "0.1", "--seeds", "1"]
    words += ["--size", "32", "--batch", "4", "--points", "1", "--tokenizer-seconds", "0.1", "--threads", "1"]
    words += ["--tokenizer-width", "4", "--vocabulary", "8", "--finetune-seconds", "0.1"]
    words += ["--finetune-rate", "0.002"]
    words += ["--methods", *METHODS]
    command.main(words)
    first = out.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["method"] for line in lines] == METHODS
    assert {"knn", "linear", "own_knn", "finetune", "diag_rankme", "curve"} <= set(lines[3])
    assert {"bn_knn", "bn_linear"} <= set(lines[5])
    assert lines[3]["steps"] >= 1
    assert "revdet_auc" in lines[3]["metrics"]
    assert "train_seconds" not in lines[2]
    assert load_tokenizer(tmp_path / "results-tokenizer").stride == 4  # half of --patch
    own = [CASES[method].learning_rate for method in METHODS[-3:]]
    assert own[0] != own[1]
    assert trained_at == own == [line["training"]["learning_rate"] for line in lines[3:]]
    assert finetuned_at == [0.002] * 4
    command.main(words)
    assert out.read_text() == first
    assert "| resnet18-cim-respix | 1 |" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000

    def of_later_code(case: Case, **sizes: int) -> ModelConfig:
        return dataclasses.replace(model_config(case, **sizes), objective=RESPIX_WIDE)

    monkeypatch.setattr(runs, "model_config", of_later_code)
    command.main([*words[: -len(METHODS)], "random", "--finetune-steps", "2"])
    again = json.loads(out.read_text().splitlines()[-1])
    assert out.read_text().startswith(first)
    assert not any(map(MORE_PROBES.fullmatch, again))
    assert again["method"] == "random"
    assert again["model"] != lines[2]["model"]
    assert again["finetune_steps"] == 2
    assert (
        f"| random, finetuning ['2 steps', 24, 0.002], model {again['model']} | 1 |"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_command__more_probes_are_of_all_encoders_and_change_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_images(tmp_path / "images", count=24, side=40))
    words = ["--train", folder, "--val", folder, "--seeds", "1", "--size", "32", "--threads", "1"]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--tokenizer-seconds", "0.1"]
    words += ["--tokenizer-width", "4", "--vocabulary", "8", "--finetune-seconds", "0"]
    words += ["--methods", "pixels", "random", "resnet18-random"]
    command.main([*words, "--out", str(tmp_path / "plain.jsonl")])
    assert "more probes" not in capsys.readouterr().out
    command.main([*words, "--out", str(tmp_path / "more.jsonl"), "--more-probes"])
    assert "| method | seeds | decoded, k-NN | decoded, linear | stage2, k-NN |" in capsys.readouterr().out
    plain, more = (read(tmp_path / f"{name}.jsonl") for name in ("plain", "more"))
    decoded = {"decoded_knn", "decoded_linear"}
    stages = {f"stage{stage}_{probe}" for stage in (2, 3) for probe in ("knn", "linear")}
    assert [set(b) - set(a) for a, b in zip(plain, more, strict=True)] == [set(), decoded, decoded | stages]
    assert all(b | a == b for a, b in zip(plain, more, strict=True))
    assert [*map(runs.record_key, plain)] == [*map(runs.record_key, more)]
