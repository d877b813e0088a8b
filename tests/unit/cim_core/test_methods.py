"""What holds for every method: CIM and its peers."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cim_core.config import (
    DecoderConfig,
    MaskingConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerSource,
)
from cim_core.data.dataset import ImageDataset, ViewConfig, collate
from cim_core.data.index import scan
from cim_core.data.sampler import SampleId
from cim_core.engine import acceleration
from cim_core.engine.state import TrainState, load_state, save_state
from cim_core.errors import CheckpointMismatchError, ConfigError, ModelError
from cim_core.export import export_encoder
from cim_core.methods import METHODS, build_model
from cim_core.optim import build_optimizer, decays
from cim_core.pretraining import Pretraining
from cim_core.samples import sample_grid
from cim_core.tokenizers.fake import FakeTokenizer
from cim_core.train import pretrain
from tests.unit.cim_core.cim_models import model_config, peer_config, rng, tiny_cim, tiny_peer, views_for
from tests.unit.cim_core.tiny import training, write_images

TILES = Path(__file__).parents[3] / "examples" / "photos" / "train.tar"
PEERS: tuple[Method, ...] = ("beit", "simmim", "mae")
ALL = get_args(Method)


def model_of(method: Method) -> Pretraining:
    return tiny_cim(model_config(patch_size=4)) if method == "cim" else tiny_peer(peer_config(method))


def tokenizer_for(config: ModelConfig) -> FakeTokenizer | None:
    return None if config.tokenizer is None else FakeTokenizer(vocab_size=16, stride=4)


@pytest.mark.parametrize("method", ALL)
def test_build__gives_each_method_the_same_encoder(method: Method) -> None:
    """Name by name the weights of timm's own network, and with one seed the same numbers."""
    weights = model_of(method).enhancer.backbone.state_dict()
    others = model_of("cim" if method != "cim" else "mae").enhancer.backbone.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("method", PEERS)
def test_build__registers_the_encoder_once(method: Method) -> None:
    state = model_of(method).state_dict()
    assert {name.partition(".")[0] for name in state} <= {"enhancer", "mask_token", "head", "decoder"}
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("method", ALL)
def test_step__every_parameter_gets_a_gradient(method: Method) -> None:
    model = model_of(method)
    model(views_for(model), generator=rng()).loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert lacking == []


@pytest.mark.parametrize("method", ALL)
def test_step__metrics_are_scalars_without_gradient(method: Method) -> None:
    model = model_of(method)
    output = model(views_for(model), generator=rng())
    assert all(value.dim() == 0 and not value.requires_grad for value in output.metrics.values())
    assert output.loss.requires_grad
    assert output.metrics["mask_share"] == output.mask_BN.float().mean()


@pytest.mark.parametrize("method", PEERS)
def test_step__masks_differ_with_the_generator_alone(method: Method) -> None:
    model = model_of(method)
    views = views_for(model)
    first, again, other = (model(views, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.mask_BN, other.mask_BN)


@pytest.mark.parametrize("method", PEERS)
def test_step__checkpointing_changes_no_gradient(method: Method) -> None:
    gradients: list[list[torch.Tensor]] = []
    for recomputed in (False, True):
        model = tiny_peer(peer_config(method, grad_checkpointing=recomputed)).train()
        assert bool(model.enhancer.backbone.grad_checkpointing) == recomputed
        model(views_for(model), generator=rng()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", PEERS)
def test_compile__is_asked_of_what_a_step_calls(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    called: set[nn.Module] = set()
    monkeypatch.setattr(nn.Module, "compile", lambda part: compiled.append(part))
    monkeypatch.setattr(acceleration, "check_compiler", lambda device: None)
    model = model_of(method)
    acceleration.accelerate(model, replace(training(), compile=True), torch.device("cpu"))
    for part in compiled:
        part.register_forward_hook(lambda part, *_: called.add(part))
    model(views_for(model), generator=rng())
    assert model.enhancer.backbone.blocks in compiled
    own = {part for name, part in model.named_children() if name in ("head", "decoder")}
    assert own <= set(compiled)
    assert called >= {part for part in compiled if list(part.parameters())}


@pytest.mark.parametrize("method", PEERS)
def test_training__loss_falls_on_a_few_photographs(method: Method) -> None:
    model = model_of(method).train()
    tiles = ImageDataset(scan(TILES), ViewConfig(image_size=32, token_size=model.token_size))
    views = collate([tiles[SampleId(0, place)] for place in range(0, 80, 10)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for number in range(60):
        loss = model(views, generator=rng(number)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("method", PEERS)
def test_optimizer__exempts_what_it_exempts_for_cim(method: Method) -> None:
    model = model_of(method)
    exempt = {name for name, p in model.named_parameters() if not decays(name, p)}
    assert {"enhancer.backbone.pos_embed", "enhancer.backbone.cls_token"} <= exempt
    assert not [name for name in exempt if name.endswith("mask_token")]


@pytest.mark.parametrize("method", PEERS)
def test_networks__other_than_plain_vits_are_refused_with_the_reason(method: Method) -> None:
    for name in ("test_resnet", "vit_relpos_small_patch16_224"):
        with pytest.raises(ModelError, match=rf"enhancer.name: {name} cannot be pre-trained by {method}"):
            tiny_peer(peer_config(method, name=name, options={}, image_size=64, patch_size=16))


@pytest.mark.parametrize("method", PEERS)
def test_samples__show_a_row_of_three(method: Method) -> None:
    model = model_of(method).train()
    picture = sample_grid(model, views_for(model, num_images=2), generator=rng())
    assert picture.size == (3 * (128 + 4) + 4, 24 + 2 * (128 + 4))
    assert model.training


@pytest.mark.parametrize("method", PEERS)
def test_export__plain_timm_gives_the_trained_features_and_the_card_names_the_method(
    method: Method, tmp_path: Path
) -> None:
    model = model_of(method).eval()
    nn.init.normal_(model.enhancer.backbone.norm.bias)  # type: ignore[union-attr, arg-type]
    folder = export_encoder(model, tmp_path, card={"steps": 3})
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=rng())
    with torch.no_grad():
        assert torch.equal(
            loaded.forward_features(images),
            model.enhancer.backbone.forward_features(images),  # type: ignore[operator]
        )
    card = (folder / "README.md").read_text(encoding="utf-8")
    names = {"beit": "BEiT (arXiv 2106.08254)", "simmim": "SimMIM (arXiv 2111.09886)"}
    assert names.get(method, "Masked Autoencoder (arXiv 2111.06377)") in card
    assert ("| Tokenizer |" in card) is (method == "beit")
    assert ("| Decoder | 2 blocks, 24 wide, 2 heads" in card) is (method == "mae")
    assert "Objective" not in card
    assert "Corrupted Image Modeling" not in card
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["tag"] == method


@pytest.mark.parametrize("method", PEERS)
def test_pretrain__cut_and_called_again_ends_as_the_uncut_run(method: Method, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", side=32)
    config = peer_config(method)

    def run(folder: Path, steps: int) -> Pretraining:
        course = training(steps=4, learning_rate=1e-3, warmup=None)
        kept: list[int] = []

        def stop(report: object) -> None:
            kept.append(1)
            if len(kept) > steps:
                raise KeyboardInterrupt

        course = replace(course, log_every=1, checkpoint_every=training(steps=2).length)
        given = tokenizer_for(config)
        return pretrain(images, config, course, tokenizer=given, checkpoints=folder, on_step=stop)

    whole = run(tmp_path / "whole", 9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 2)
    assert (tmp_path / "cut" / "step-2" / "state.json").exists()
    again = run(tmp_path / "cut", 9)
    assert type(again) is METHODS[method]
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_checkpoint__of_a_release_that_knew_one_method_is_cims(tmp_path: Path) -> None:
    """Its record lacks the keys that came with the peers, and holds the numbers that were defaults."""
    cim = tiny_cim()
    state = TrainState(model=cim, optimizer=build_optimizer(cim, training()))
    now = {"model": asdict(cim.config)}
    old = json.loads(json.dumps(now))
    assert old["model"]["masking"]["min_ratio"] == 0.51
    assert old["model"]["generator"]["depth"] == 2
    for key in ("method", "decoder"):
        del old["model"][key]
    del old["model"]["masking"]["unit"]
    save_state(state, tmp_path, fingerprint=old)
    load_state(state, tmp_path, fingerprint=now)
    with pytest.raises(CheckpointMismatchError, match=r"model\.method was 'cim', now 'mae'"):
        load_state(state, tmp_path, fingerprint={"model": {**now["model"], "method": "mae"}})


def test_build__refuses_a_tokenizer_where_none_is_used_and_asks_for_one_where_it_is() -> None:
    with pytest.raises(ModelError, match="tokenizer: belongs to cim and beit, not to mae"):
        build_model(peer_config("mae"), FakeTokenizer())
    with pytest.raises(ModelError, match="tokenizer: must be able to encode and decode, got NoneType"):
        build_model(peer_config("beit"))
    real = replace(peer_config("beit"), tokenizer=TokenizerSource(source="job:mine"))
    with pytest.raises(ModelError, match=r"tokenizer.source: 'job:mine' gave the untrained stand-in"):
        build_model(real, FakeTokenizer())


MISTAKES: dict[str, tuple[Method, dict[str, object], list[str]]] = {
    "cim without what it needs": ("cim", {}, ["tokenizer", "objective"]),
    "beit without tokenizer": ("beit", {}, ["tokenizer"]),
    "mae with everything of cim": (
        "mae",
        {
            "tokenizer": TokenizerSource(source="fake"),
            "objective": ObjectiveConfig(name="respix"),
            "interpolation": "bilinear",
        },
        ["tokenizer", "objective", "interpolation"],
    ),
    "simmim with a decoder": ("simmim", {"decoder": DecoderConfig()}, ["decoder"]),
    "a unit for mae": ("mae", {"masking": MaskingConfig(unit=32)}, ["masking.unit"]),
    "a unit that no patch divides": ("simmim", {"masking": MaskingConfig(unit=24)}, ["masking.unit"]),
    "blocks and uneven counts for mae": (
        "mae",
        {"masking": MaskingConfig(strategy="block", max_ratio=0.8)},
        ["masking.max_ratio", "masking.strategy"],
    ),
    "above what the method leaves open": (
        "beit",
        {"tokenizer": TokenizerSource(source="fake"), "masking": MaskingConfig(min_ratio=0.5)},
        ["masking.max_ratio"],
    ),
    "shared blocks for a peer": (
        "mae",
        {"enhancer": replace(peer_config("mae").enhancer, shared_blocks=1)},
        ["enhancer.shared_blocks"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_config__names_every_key_that_does_not_go_with_the_method(mistake: str) -> None:
    method, changes, paths = MISTAKES[mistake]
    given = {"enhancer": peer_config("mae").enhancer, **changes}
    with pytest.raises(ConfigError) as caught:
        ModelConfig(method=method, **given)  # type: ignore[arg-type]
    assert [path for path, _ in caught.value.problems] == paths
    assert all("got " in lesson for _, lesson in caught.value.problems)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("cim", ("random", 100, 120)),
        ("beit", ("block", 75, 75)),
        ("simmim", ("random", 118, 118)),
        ("mae", ("random", 147, 147)),
    ],
)
def test_resolved__masks_are_the_methods_and_what_is_given_stays(
    method: Method, expected: tuple[str, int, int]
) -> None:
    config = model_config() if method == "cim" else peer_config(method)
    masking = config.resolved.masking
    assert masking.min_ratio is not None
    assert masking.max_ratio is not None
    counts = (round(masking.min_ratio * 196), round(masking.max_ratio * 196))
    assert (masking.strategy, *counts) == expected
    assert config.resolved.resolved == config.resolved
    mine = replace(config, masking=MaskingConfig(min_ratio=0.3, max_ratio=0.3, block_min_cells=4)).resolved
    assert (mine.masking.min_ratio, mine.masking.block_min_cells) == (0.3, 4)
    assert mine.masking.strategy == masking.strategy
