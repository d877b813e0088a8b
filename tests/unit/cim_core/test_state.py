import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cim_core.config import TrainingConfig
from cim_core.engine.state import TrainState, is_complete, load_state, save_state, take_snapshot
from cim_core.errors import CheckpointMismatchError, NonFiniteError
from cim_core.optim import build_optimizer

FINGERPRINT = {"model": {"depth": 2, "sizes": [8, 16]}, "seed": 0}


class Shared(nn.Module):
    """One matrix under two names, a buffer of integers, and a parameter without gradient."""

    def __init__(self, *, width: int = 3, shared: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        if shared:
            self.b.weight = self.a.weight
        self.idle = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x))
        return y


def new_state(**changes: Any) -> TrainState:
    model = Shared(**changes)
    return TrainState(model=model, optimizer=build_optimizer(model, TrainingConfig(steps=1)))


def trained_state() -> TrainState:
    state = new_state()
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        state.optimizer.zero_grad()
        state.model(torch.ones(2, 3)).square().sum().backward()
        state.optimizer.step()
        state.step += 1
    return state


def assert_same(one: TrainState, other: TrainState) -> None:
    assert one.step == other.step
    for (name, x), y in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in ours["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, theirs["state"][index][key]), (index, key)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(trained_state(), tmp_path / "c", fingerprint=FINGERPRINT)
    return tmp_path / "c"


def refusal(state: TrainState, folder: Path, fingerprint: dict[str, Any] = FINGERPRINT) -> str:
    before = {name: x.clone() for name, x in state.model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_state(state, folder, fingerprint=fingerprint)
    assert all(torch.equal(x, before[name]) for name, x in state.model.state_dict().items())
    assert (state.step, dict(state.optimizer.state)) == (0, {})
    return str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**record, **changes}))


def test_round_trip__everything_comes_back(tmp_path: Path) -> None:
    first, second = trained_state(), new_state()
    save_state(first, tmp_path, fingerprint=FINGERPRINT)
    load_state(second, tmp_path, fingerprint=FINGERPRINT)
    assert_same(first, second)
    assert second.step == 3


def test_round_trip__a_shared_parameter_stays_shared_and_is_saved_once(saved: Path) -> None:
    names = set(load_file(saved / "state.safetensors"))
    assert "model/a.weight" in names
    assert "model/b.weight" not in names
    state = new_state()
    load_state(state, saved, fingerprint=FINGERPRINT)
    assert state.model.get_parameter("a.weight") is state.model.get_parameter("b.weight")


def test_save__names_not_indices(saved: Path) -> None:
    optimizer = {name for name in load_file(saved / "state.safetensors") if name.startswith("optimizer/")}
    keys, trained = ("exp_avg", "exp_avg_sq", "step"), ("a.weight", "a.bias", "b.bias")
    assert optimizer == {f"optimizer/{key}/{name}" for key in keys for name in trained}


def test_save__before_the_first_step(tmp_path: Path) -> None:
    save_state(new_state(), tmp_path, fingerprint={})
    state = new_state()
    load_state(state, tmp_path, fingerprint={})
    assert (state.step, len(state.optimizer.state)) == (0, 0)


def test_save__replaces_an_older_state(saved: Path) -> None:
    newer = trained_state()
    newer.step = 9
    save_state(newer, saved, fingerprint=FINGERPRINT)
    state = new_state()
    load_state(state, saved, fingerprint=FINGERPRINT)
    assert_same(newer, state)


def test_save__memory_in_another_order_and_parts_of_one_memory(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            whole = torch.arange(6.0).view(2, 3)
            self.register_buffer("turned", whole.t())
            self.register_buffer("row", whole[0])
            self.register_buffer("nothing", torch.empty(0))
            self.register_buffer("nothing_else", torch.empty(0))

    def state() -> TrainState:
        model = Odd()
        return TrainState(model=model, optimizer=torch.optim.SGD(model.parameters()))

    save_state(state(), tmp_path, fingerprint={})
    again = state()
    again.model.load_state_dict({name: x.clone().zero_() for name, x in again.model.state_dict().items()})
    load_state(again, tmp_path, fingerprint={})
    assert torch.equal(again.model.get_buffer("turned"), torch.arange(6.0).view(2, 3).t())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a.bias", "mean"])
def test_write__refuses_what_is_not_finite_and_leaves_the_folder(
    saved: Path, name: str, value: float
) -> None:
    state = new_state()
    state.model.register_buffer("mean", torch.zeros(2, 2))
    with torch.no_grad():
        state.model.state_dict()[name].flatten()[-1] = value
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    snapshot = take_snapshot(state, fingerprint=FINGERPRINT)
    with pytest.raises(NonFiniteError, match=rf"^step 0: {re.escape(name)} is not finite"):
        snapshot.write(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_write__a_sum_beyond_float32_is_finite(tmp_path: Path) -> None:
    state = new_state()
    with torch.no_grad():
        state.model.get_parameter("idle").fill_(3e38)
    save_state(state, tmp_path, fingerprint={})
    load_state(new_state(), tmp_path, fingerprint={})


def test_write__the_record_appears_as_a_whole_or_not_at_all(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plug is pulled before the record is on the disk: nothing there passes for a state."""
    assert is_complete(saved)

    def pulled(number: int) -> None:
        raise OSError("the plug is pulled")

    monkeypatch.setattr(os, "fsync", pulled)
    with pytest.raises(OSError, match="the plug"):
        save_state(trained_state(), saved, fingerprint=FINGERPRINT)
    assert not (saved / "state.json").exists()
    assert not is_complete(saved)
    monkeypatch.undo()
    save_state(trained_state(), saved, fingerprint=FINGERPRINT)
    assert sorted(file.name for file in saved.iterdir()) == ["state.json", "state.safetensors"]
    load_state(new_state(), saved, fingerprint=FINGERPRINT)


def test_write__what_is_replaced_into_place_was_flushed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    flush, replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        files = {file.stat().st_ino: file.name for file in (tmp_path / "c").iterdir()}
        story.append(files[os.fstat(number).st_ino])
        flush(number)

    def move(old: Path, new: Path) -> None:
        story.append(f"{Path(old).name} to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    save_state(new_state(), tmp_path / "c", fingerprint={})
    assert story == ["state.safetensors", "state.json.new", "state.json.new to state.json"]


def test_complete__one_of_another_format_is_refused_and_not_passed_over(saved: Path) -> None:
    edit(saved, format=99)
    assert is_complete(saved)


@pytest.mark.parametrize("text", [None, "", '{"format": 1', "[]", '"state"'])
def test_complete__a_torn_record_is_none(saved: Path, text: str | None) -> None:
    (saved / "state.json").unlink()
    if text is not None:
        (saved / "state.json").write_text(text)
    assert not is_complete(saved)


def test_load__fingerprint_differs_key_by_key(saved: Path) -> None:
    message = refusal(new_state(), saved, {"model": {"depth": 3, "sizes": [8, 16]}, "data": "x"})
    assert "  - model.depth was 2, now 3" in message
    assert "  - data was 'absent', now 'x'" in message
    assert "  - seed was 0, now 'absent'" in message
    assert "sizes" not in message


def test_load__tuples_count_as_lists(saved: Path) -> None:
    load_state(new_state(), saved, fingerprint={"model": {"depth": 2, "sizes": (8, 16)}, "seed": 0})


def test_load__another_shape(saved: Path) -> None:
    message = refusal(new_state(width=4), saved)
    assert "a.weight is float32[3, 3] in the checkpoint, float32[4, 4] here" in message
    assert "exp_avg/a.weight has shape [3, 3], the parameter [4, 4]" in message


def test_load__sharing_differs(saved: Path) -> None:
    message = refusal(new_state(shared=False), saved)
    assert "the checkpoint lacks b.weight" in message
    assert "b.weight shares memory with a.weight in the checkpoint, with nothing here" in message


def test_load__all_differences_at_once(saved: Path) -> None:
    state = new_state()
    state.model.add_module("new", nn.Linear(1, 1))
    del state.model.a
    message = refusal(state, saved, {**FINGERPRINT, "seed": 1})
    for part in ("lacks new.weight", "the model has no a.weight", "seed was 0, now 1", "does not train here"):
        assert part in message


def test_load__a_tensor_was_lost_from_the_file(saved: Path) -> None:
    tensors = load_file(saved / "state.safetensors")
    del tensors["optimizer/exp_avg/a.bias"], tensors["model/count"]
    save_file(tensors, saved / "state.safetensors")
    message = refusal(new_state(), saved)
    assert "optimizer/exp_avg/a.bias is recorded, but not in state.safetensors" in message
    assert "the checkpoint lacks count" in message


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_load__truncated_files(saved: Path, keep: int) -> None:
    whole = (saved / "state.safetensors").read_bytes()
    (saved / "state.safetensors").write_bytes(whole[:keep])
    assert "state.safetensors cannot be read" in refusal(new_state(), saved)
    (saved / "state.json").write_text("{")
    assert "state.json cannot be read" in refusal(new_state(), saved)


def test_load__no_checkpoint_there(tmp_path: Path) -> None:
    assert "state.json cannot be read" in refusal(new_state(), tmp_path)


def test_load__another_format(saved: Path) -> None:
    edit(saved, format=99)
    assert "not a training state of format 1" in refusal(new_state(), saved)
