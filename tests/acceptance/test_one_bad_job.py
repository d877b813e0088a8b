"""One bad job never stops the others, whatever is wrong with it, on the whole service as a user has it."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.data_folder import DataFolder
from tests.acceptance.embedded import Embedded, specs

Spec = dict[str, Any]
DEEP = 60  # folders, each with a name of 200 characters: more than a path may have
WORDS_THAT_ARE_NUMBERS = ("inf", "-inf", "nan", "Infinity", "1e400", "1e999")


def _unencodable(folder: Path) -> Spec:
    folder.mkdir()
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))).write_bytes(b"not a picture")
    return specs.tokenizer("unencodable", data={"uri": str(folder)})


def _looping(folder: Path) -> Spec:
    folder.mkdir()
    (folder / "a.txt").write_text("so that it holds a file")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "here").symlink_to(".")
    return specs.tokenizer("looping", data={"uri": str(folder)})


def _deep(folder: Path) -> Spec:
    folder.mkdir()
    (folder / "a.txt").write_text("so that it holds a file")
    here = os.open(folder, os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("deep.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    return specs.tokenizer("deep", data={"uri": str(folder)})


def _cut_off(folder: Path) -> Spec:
    folder.mkdir()
    (folder / "cut.tar").write_bytes(specs.TRAIN_TAR.read_bytes()[:700])
    return specs.tokenizer("cut-off", data={"uri": str(folder / "cut.tar")})


def _diverging(_: Path) -> Spec:
    training = specs.training(40, learning_rate=100.0, warmup={"steps": 1}, clip_norm=0)
    return {**specs.tokenizer("diverging"), "training": training}


def _no_encoder(folder: Path) -> Spec:
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": ' + "[" * 5000 + "1e999" + "]" * 5000 + "}")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    return specs.evaluate("no-encoder", str(folder))


POISON = (_unencodable, _looping, _deep, _cut_off, _diverging, _no_encoder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nine_jobs__three_healthy_ones_succeed_and_six_poisonous_ones_end_at_once(
    embedded: Embedded, tmp_path: Path
) -> None:
    healthy = [specs.tokenizer(f"healthy-{number}", steps=10) for number in range(3)]
    poisonous = [make(tmp_path / make.__name__) for make in POISON]
    # A poisonous one first, then in turns.
    together = [*poisonous[:2], healthy[0], *poisonous[2:4], healthy[1], *poisonous[4:], healthy[2]]
    jobs = {job.name: job.id for job in embedded.client.submit(together)}
    ended = {name: embedded.finished(job_id) for name, job_id in jobs.items()}
    for spec in healthy:
        assert ended[spec["name"]].state == "succeeded", ended[spec["name"]].reason
    for spec in poisonous:
        job = ended[spec["name"]]
        told = (job.name, job.state, job.failure_kind, len(job.attempts), job.reason)
        assert told[1:4] == ("failed", "user", 1), told
        assert len(job.reason.split()) > 5, told
        assert "Traceback" not in job.reason, told
    assert "caf\\xe9" in ended["unencodable"].reason or "caf\\udce9" in ended["unencodable"].reason


@pytest.mark.parametrize("word", WORDS_THAT_ARE_NUMBERS)
@pytest.mark.parametrize("key", ["weight_decay", "epochs"])
def test_submit__a_word_that_python_takes_for_a_number_is_refused_as_a_user_types_it(
    embedded: Embedded, tmp_path: Path, key: str, word: str
) -> None:
    length = "" if key == "epochs" else "epochs: 1, "
    file = tmp_path / "spec.yaml"
    file.write_text(
        f"kind: tokenizer\nname: tok\ndata: {{uri: {specs.TRAIN_TAR}}}\n"
        f"training: {{{length}batch_size: 4, {key}: {word}}}\n"
    )
    before = {job.id for job in embedded.client.jobs()}
    cim = [sys.executable, "-c", "from service.cli.main import main; main()"]
    command = [*cim, "submit", str(file), "--url", embedded.api]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"training.{key}: " in ended.stderr
    assert word.removeprefix("-") in ended.stderr
    assert {job.id for job in embedded.client.jobs()} == before


@pytest.mark.slow
def test_stored_poison__is_passed_over_while_the_service_runs(embedded: Embedded) -> None:
    """The fault as it was found: a row whose numbers are none kept everybody's jobs waiting."""
    waits = specs.tokenizer("waits", resources={"workers": 1, "cpus_per_worker": 256}, priority=100)
    (poisoned,) = embedded.client.submit([waits])
    resolved = {
        **poisoned.resolved,
        "training": {**poisoned.resolved["training"], "weight_decay": float("inf")},
    }
    with sqlite3.connect(DataFolder(path=embedded.data_dir).database, timeout=60) as database:
        database.execute("UPDATE jobs SET resolved = ? WHERE id = ?", (json.dumps(resolved), poisoned.id))
    (healthy,) = embedded.client.submit([specs.tokenizer("behind-poison", steps=10)])
    assert embedded.finished(healthy.id).state == "succeeded"
    told = embedded.client.job(poisoned.id)
    assert told.state == "queued"
    assert "malformed JSON" in told.reason
    assert httpx.get(f"{embedded.api}/readyz", trust_env=False).status_code == 200
    assert poisoned.id in {job.id for job in embedded.client.jobs()}
    assert embedded.client.cancel(poisoned.id).state == "cancelled"
