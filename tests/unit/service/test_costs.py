"""Costs by a child process: every way in which it can end."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cim_core.config import TokenizerConfig, TrainingConfig
from service.contracts.estimates import Question
from service.jobs.costs import ChildCosts, NoCostError
from tests.fakes.costs import COST

QUESTION = Question(
    pretrain=None,
    tokenizer=TokenizerConfig(image_size=16, width=8),
    training=TrainingConfig(steps=1, batch_size=2, precision="fp32"),
    workers=1,
)
OTHER = QUESTION.model_copy(update={"workers": 2})


def child(code: str) -> ChildCosts:
    return ChildCosts([sys.executable, "-c", f"import sys, time\n{code}"], needs=())


async def test_cost__the_real_child_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await ChildCosts().cost(QUESTION, limit_s=120)
    assert set(found.parameters) == set(found.macs_per_image) == {"encoder", "quantiser", "decoder"}
    assert found.memory_per_worker.peak_bytes > found.memory_per_worker.model_bytes > 0
    assert found.macs_per_training_image > sum(found.macs_per_image.values())


async def test_cost__the_real_child_says_why_a_model_cannot_be_built() -> None:
    assert QUESTION.tokenizer is not None
    from_core = {"enhancer": {"name": "no_such_model"}, "objective": {"name": "respix"}}
    model = {"tokenizer": {"source": "fake"}, **from_core}
    question = Question.model_validate({**QUESTION.model_dump(), "pretrain": model})
    with pytest.raises(NoCostError, match="has no model 'no_such_model'"):
        await ChildCosts().cost(question, limit_s=120)


async def test_cost__is_asked_once_for_each_question(tmp_path: Path) -> None:
    answer = json.dumps(COST.model_dump())
    costs = child(f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); print({answer!r})")
    for question in (QUESTION, OTHER, replace_training(QUESTION), QUESTION):
        assert await costs.cost(question, limit_s=30) == COST
    assert (tmp_path / "asked").read_text() == "xx"


def replace_training(question: Question) -> Question:
    """An equal question that is another object."""
    return question.model_copy(update={"training": replace(question.training)})


async def test_cost__a_reason_is_kept_like_an_answer(tmp_path: Path) -> None:
    told = json.dumps({"problem": "it cannot be built"})
    costs = child(f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); print({told!r})")
    for _ in range(2):
        with pytest.raises(NoCostError, match="it cannot be built"):
            await costs.cost(QUESTION, limit_s=30)
    assert (tmp_path / "asked").read_text() == "x"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise MemoryError('too big')", "status 1: MemoryError: too big"),
        ("sys.exit(3)", "status 3: it said nothing"),
        ("print('no JSON')", "no answer"),
        ("print('{}')", "no answer"),
        ("print('x' * 2**20)", "more than"),
    ],
)
async def test_cost__a_child_that_fails_is_told_of(code: str, words: str) -> None:
    with pytest.raises(NoCostError, match=words):
        await child(code).cost(QUESTION, limit_s=30)


async def test_cost__a_failure_is_not_kept(tmp_path: Path) -> None:
    answer = json.dumps(COST.model_dump())
    flag = str(tmp_path / "second")
    costs = child(
        f"import os\nif not os.path.exists({flag!r}): open({flag!r}, 'w'); sys.exit(1)\nprint({answer!r})"
    )
    with pytest.raises(NoCostError, match="status 1"):
        await costs.cost(QUESTION, limit_s=30)
    assert await costs.cost(QUESTION, limit_s=30) == COST


def sleepers() -> list[psutil.Process]:
    """The children of these tests that are still there; other tests leave helpers of torch's."""
    return [child for child in psutil.Process().children() if "time.sleep(600)" in " ".join(child.cmdline())]


async def test_cost__a_child_that_takes_too_long_is_ended() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    costs = ChildCosts(command, needs=(), child_limit_s=0.5)
    for _ in range(2):
        with pytest.raises(NoCostError, match="took longer than 0 s"):
            await costs.cost(QUESTION, limit_s=30)
        assert not sleepers()


async def test_cost__who_does_not_wait_finds_the_answer_later(tmp_path: Path) -> None:
    answer = json.dumps(COST.model_dump())
    here = str(tmp_path / "go")
    costs = child(
        f"import pathlib\nwhile not pathlib.Path({here!r}).exists(): time.sleep(0.01)\nprint({answer!r})"
    )
    with pytest.raises(NoCostError, match="ask again"):
        await costs.cost(QUESTION, limit_s=0.1)
    (tmp_path / "go").touch()
    assert await costs.cost(QUESTION, limit_s=30) == COST


async def test_cost__a_child_ends_with_the_service() -> None:
    costs = child("time.sleep(600)")
    with pytest.raises(NoCostError):
        await costs.cost(QUESTION, limit_s=0.5)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:  # as the loop does when it closes
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    assert not sleepers()


async def test_cost__too_many_questions_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.costs._MOST_WAITING", 1)
    costs = child("time.sleep(600)")
    with pytest.raises(NoCostError, match="it goes on"):
        await costs.cost(QUESTION, limit_s=0)
    with pytest.raises(NoCostError, match="1 other networks"):
        await costs.cost(OTHER, limit_s=0)


async def test_cost__old_answers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.costs._MOST_KEPT", 1)
    answer = json.dumps(COST.model_dump())
    costs = child(f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); print({answer!r})")
    for question in (QUESTION, OTHER, OTHER, QUESTION):
        await costs.cost(question, limit_s=30)
    assert (tmp_path / "asked").read_text() == "xxx"


async def test_cost__children_come_one_after_the_other(tmp_path: Path) -> None:
    folder = str(tmp_path)
    answer = json.dumps(COST.model_dump())
    costs = child(
        f"import pathlib; here = pathlib.Path({folder!r}, 'busy'); here.touch(exist_ok=False)\n"
        f"time.sleep(0.2); here.unlink(); print({answer!r})"
    )
    questions = [QUESTION.model_copy(update={"workers": number}) for number in (1, 2, 3)]
    answers = await asyncio.gather(*(costs.cost(question, limit_s=30) for question in questions))
    assert answers == [COST] * 3


async def test_cost__nothing_is_started_without_the_packages() -> None:
    costs = ChildCosts(["/no/such/program"], needs=("sys", "no_such_package"))
    with pytest.raises(NoCostError, match="no_such_package is not installed"):
        await costs.cost(QUESTION, limit_s=30)
