"""A run cut anywhere and resumed ends as the uncut run: weights, optimizer, buffers, samples, bit by bit."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from cim_core.cim import build_cim
from cim_core.config import (
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
)
from cim_core.data.dataset import ViewConfig, Views
from cim_core.data.sampler import epoch_order
from cim_core.engine.step import Task
from cim_core.engine.transfer import Readback
from cim_core.methods import build_model
from cim_core.seeding import generator_for
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task
from tests.unit.cim_core.tiny import NUM_IMAGES, Delayed, Run, TinyNet, TinyTask, run, training, write_images

TOTAL = 10  # steps of 4 of 10 images: epochs end inside step 3 and exactly after step 5
CUTS = {
    "inside_an_epoch": [2],
    "inside_the_step_of_a_border": [3],
    "exactly_at_a_border": [5],
    "twice_in_one_epoch": [6, 7],
    "after_each_of_three_steps": [1, 2, 3],
    **{f"after_step_{step}": [step] for step in range(1, TOTAL)},
    "after_every_step": list(range(1, TOTAL)),
}
# Models whose numbers come late, which is the engine's business and no model's.
LATE = ("tiny", "cim_vit_respix", "cim_resnet_average", "tokenizer_vq")
TWICE = [6, 7]  # both inside the third epoch
Samples = list[tuple[int, ...]]


def tokenizer_model(**changes: object) -> DiscreteVAE:
    config = TokenizerConfig(image_size=16, stride=4, width=4, vocab_size=16, code_dim=4, **changes)  # type: ignore[arg-type]
    return DiscreteVAE(config, generator=generator_for(0, "init", "tokenizer"))


def cim_model(enhancer: EnhancerConfig, objective: str, *, patch_size: int) -> nn.Module:
    config = ModelConfig(
        tokenizer=TokenizerSource(source="tests give it"),
        enhancer=enhancer,
        objective=ObjectiveConfig(name=objective, window=4),  # type: ignore[arg-type]
        image_size=4 * patch_size,
        patch_size=patch_size,
        generator=GeneratorConfig(depth=2, width=64, heads=2),
    )
    return build_cim(config, tokenizer_model())


def peer_model(method: Method) -> nn.Module:
    config = ModelConfig(
        method=method,
        tokenizer=TokenizerSource(source="tests give it") if method == "beit" else None,
        enhancer=replace(VIT, shared_blocks=None, ema_decay=0.8),
        image_size=32,
        patch_size=8,
        decoder=DecoderConfig(depth=1, width=32, heads=2) if method == "mae" else None,
    )
    return build_model(config, tokenizer_model() if method == "beit" else None)


VIT = EnhancerConfig(
    name="vit_tiny_patch16_224",
    options={"depth": 2, "embed_dim": 64, "num_heads": 2, "drop_path_rate": 0.3},
    shared_blocks=1,
)
AVERAGED = EnhancerConfig(name="test_resnet", grad_checkpointing=True, ema_decay=0.8)
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "tiny": TinyNet,
    "cim_vit_respix": lambda: cim_model(VIT, "respix", patch_size=8),
    "cim_resnet_revdet": lambda: cim_model(EnhancerConfig(name="test_resnet"), "revdet", patch_size=16),
    "cim_resnet_average": lambda: cim_model(AVERAGED, "revdet", patch_size=16),
    "cim_peer_beit": lambda: peer_model("beit"),
    "cim_peer_simmim": lambda: peer_model("simmim"),
    "cim_peer_mae": lambda: peer_model("mae"),
    "tokenizer_vq": lambda: tokenizer_model(quantiser="vq"),
    "tokenizer_relaxed": lambda: tokenizer_model(quantiser="relaxed"),
}
REAL = sorted(set(MODELS) - {"tiny"})


VIEWS = {  # CIM: 4 x 4 patches, and as many tokens of 4 pixels
    "cim_vit_respix": ViewConfig(image_size=32, token_size=16),
    "cim_resnet_revdet": ViewConfig(image_size=64, token_size=16),
    "cim_resnet_average": ViewConfig(image_size=64, token_size=16),
    "cim_peer_beit": ViewConfig(image_size=32, token_size=16),
    "cim_peer_simmim": ViewConfig(image_size=32),
    "cim_peer_mae": ViewConfig(image_size=32),
}
ONE_PICTURE = ViewConfig(image_size=16)


def task_of(name: str, module: nn.Module) -> Task[Views]:
    if name == "tiny":
        return TinyTask(module)
    make: Callable[..., Task[Views]] = cim_task if name.startswith("cim") else tokenizer_task
    return make(module, seed=0)


def train(name: str, images: Path, out: Path, *, cuts: Sequence[int] = (), ranks: int = 1) -> Samples:
    """A run in pieces, each with new objects as in a new process; the samples it saw, in order."""
    seen: Samples = []
    resume: Path | None = None
    for stop_at in [*cuts, None]:
        piece = train_piece(name, images, out, resume=resume, stop_at=stop_at, ranks=ranks)
        assert piece.result.step == (stop_at or TOTAL)
        assert piece.result.stopped == (stop_at is not None)
        seen += piece.seen
        resume = out / f"step-{piece.result.step}"
    return seen


def train_killed(
    name: str, images: Path, out: Path, *, cuts: Sequence[int] = (), ranks: int = 1, **changes: object
) -> Samples:
    """As `train`, but each piece trains on after its checkpoint, which is written only then, and is lost."""
    seen: Samples = []
    start = 0
    for cut in [*cuts, TOTAL]:
        piece = train_piece(
            name, images, out, ranks=ranks, stop_at=cut + 1, make_recorder=Delayed,
            checkpoint_steps=frozenset({cut, TOTAL}), **changes,
            resume=out / f"step-{start}" if start else None,
        )  # fmt: skip
        assert piece.result.step > cut or cut == TOTAL
        assert ("checkpoint", cut) in piece.recorder.calls
        seen += piece.seen[: (cut - start) * training().batch_size // ranks]
        start = cut
    return seen


def train_piece(name: str, images: Path, out: Path, *, ranks: int, **options: Any) -> Run:
    """`options` are those of `run`, and settings of the training."""
    model = MODELS[name]()
    module: nn.Module = model
    if ranks > 1:
        module = DistributedDataParallel(model, find_unused_parameters=name == "tiny")
    keys = ("resume", "stop_at", "checkpoint_steps", "make_recorder")
    own = {key: options.pop(key) for key in keys if key in options}
    return run(
        images, out, model=model, task=task_of(name, module), config=training(**options),
        views=VIEWS.get(name, ONE_PICTURE), **own,
        no_sync=module.no_sync if isinstance(module, DistributedDataParallel) else None,
    )  # fmt: skip


@contextmanager
def numbers_come_late() -> Iterator[None]:
    """As on a GPU: the numbers of a step are read when the next one is queued."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readback, "at_hand", False)
        yield


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit in two final states."""
    one, other = (load_file(out / f"step-{TOTAL}" / "state.safetensors") for out in (a, b))
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# Of two ranks: the model, and what of it is compared with what.
COMPARED = [
    *((name, cut, "whole") for name in MODELS for cut in ("parts", "killed")),
    *((name, "late parts", "late whole") for name in LATE),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uncut(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    out = tmp_path_factory.mktemp("uncut")
    return out, train("tiny", images, out)


@pytest.mark.parametrize("case", CUTS)
def test_cut__ends_as_the_uncut_run(
    case: str, images: Path, uncut: tuple[Path, Samples], tmp_path: Path
) -> None:
    seen = train("tiny", images, tmp_path, cuts=CUTS[case])
    assert seen == uncut[1]
    assert differing(tmp_path, uncut[0]) == []


def test_uncut__weights_depend_on_what_a_resume_must_restore(
    images: Path, uncut: tuple[Path, Samples], tmp_path: Path
) -> None:
    """The comparison would see a lost step counter: a run that begins again ends elsewhere."""
    early = uncut[0] / f"step-{TOTAL}"
    model = TinyNet()
    again = run(images, tmp_path, model=model, task=TinyTask(model), config=training(seed=1))
    assert again.result.step == TOTAL
    assert "model/stem.weight" in differing(tmp_path, early.parent)


def test_uncut__sees_the_stream_and_nothing_else(uncut: tuple[Path, Samples]) -> None:
    orders = [epoch_order(NUM_IMAGES, 0, epoch).tolist() for epoch in range(TOTAL * 4 // NUM_IMAGES)]
    assert uncut[1] == [(epoch, place) for epoch, order in enumerate(orders) for place in order]


def test_uncut__each_image_once_in_each_epoch(uncut: tuple[Path, Samples]) -> None:
    assert Counter(uncut[1]) == {(epoch, place): 1 for epoch in range(4) for place in range(NUM_IMAGES)}


def test_finished__trains_nothing(images: Path, uncut: tuple[Path, Samples], tmp_path: Path) -> None:
    model = TinyNet()
    finished = uncut[0] / f"step-{TOTAL}"
    again = run(images, tmp_path, model=model, task=TinyTask(model), config=training(), resume=finished)
    assert (again.result.step, again.result.stopped) == (TOTAL, False)
    assert again.recorder.calls == [("start", TOTAL)]
    assert again.seen == []


@pytest.mark.parametrize("name", REAL)
def test_real_model__cut_twice_ends_as_the_uncut_run(name: str, images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(name, images, parts, cuts=[3, 5]) == train(name, images, whole)
    assert differing(parts, whole) == []


@pytest.mark.parametrize("cuts", [[6], [6, 7], [3, 5, 8]], ids=str)
def test_killed_while_a_copy_is_written__ends_as_the_uncut_run(
    cuts: list[int], images: Path, uncut: tuple[Path, Samples], tmp_path: Path
) -> None:
    assert train_killed("tiny", images, tmp_path, cuts=cuts) == uncut[1]
    assert differing(tmp_path, uncut[0]) == []


@pytest.mark.parametrize("name", LATE)
def test_numbers_come_late__killed_twice_in_one_epoch(name: str, images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with numbers_come_late():
        seen = train_killed(name, images, whole, fused_optimizer=True)
        assert train_killed(name, images, parts, cuts=[6, 7], fused_optimizer=True) == seen
    assert differing(parts, whole) == []


@pytest.fixture(scope="module")
def two_ranks(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, uncut and cut, in one pair of processes; starting a pair takes seconds."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank_process, args=(str(images), str(out)), nprocs=2)  # type: ignore[no-untyped-call]
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "cut", "uncut_one"), COMPARED)
def test_two_ranks__cut_end_as_the_uncut_run(name: str, cut: str, uncut_one: str, two_ranks: Path) -> None:
    for rank in range(2):
        assert samples(two_ranks / name / cut, rank) == samples(two_ranks / name / uncut_one, rank)
    assert differing(two_ranks / name / cut, two_ranks / name / uncut_one) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks__moments_are_compared_too(two_ranks: Path) -> None:
    for name in LATE:
        tensors = load_file(two_ranks / name / "late parts" / f"step-{TOTAL}" / "state.safetensors")
        kinds = {key.split("/")[1] for key in tensors if key.startswith("optimizer/")}
        assert kinds == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks__together_see_what_one_sees(two_ranks: Path, uncut: tuple[Path, Samples]) -> None:
    both = [samples(two_ranks / "tiny" / "whole", rank) for rank in range(2)]
    per_step = [both[rank][2 * step : 2 * step + 2] for step in range(TOTAL) for rank in range(2)]
    assert [sample for share in per_step for sample in share] == uncut[1]


def samples(out: Path, rank: int) -> Samples:
    return [tuple(s) for s in json.loads((out / f"samples-{rank}.json").read_text())]


def _rank_process(rank: int, images: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{out}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name in MODELS:
        for kind, train_one in _kinds(name, Path(images)).items():
            folder = Path(out) / name / kind
            folder.mkdir(parents=True, exist_ok=True)
            seen = train_one(folder)
            (folder / f"samples-{rank}.json").write_text(json.dumps(seen))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _kinds(name: str, images: Path) -> dict[str, Callable[[Path], Samples]]:
    def late(out: Path, cuts: Sequence[int]) -> Samples:
        with numbers_come_late():
            return train_killed(name, images, out, cuts=cuts, ranks=2, fused_optimizer=True)

    kinds: dict[str, Callable[[Path], Samples]] = {
        "whole": lambda out: train(name, images, out, ranks=2),
        "parts": lambda out: train(name, images, out, cuts=[3, 5], ranks=2),
        "killed": lambda out: train_killed(name, images, out, cuts=TWICE, ranks=2),
    }
    if name in LATE:
        kinds |= {"late whole": lambda out: late(out, []), "late parts": lambda out: late(out, TWICE)}
    return kinds
