"""BEiT against timm's own forward pass, and against CIM's generator, whose task it is."""

import pytest
import torch
from torch.nn import functional as F

from cim_core.config import GeneratorConfig, MaskingConfig, ModelConfig, ObjectiveConfig, TokenizerSource
from cim_core.data.dataset import Views
from cim_core.models.generator import SmallBEiT
from cim_core.peers.beit import Beit, BeitOutput
from tests.unit.cim_core.cim_models import peer_config, rng, tiny_peer, views_for


def beit(**changes: object) -> Beit:
    model = tiny_peer(peer_config("beit", **changes))  # type: ignore[arg-type]
    assert isinstance(model, Beit)
    return model


def step(model: Beit, views: Views, *, seed: int = 0) -> BeitOutput:
    output = model(views, generator=rng(seed))
    assert isinstance(output, BeitOutput)
    return output


def test_forward__is_timms_own_on_embeddings_with_the_mask_token_put_in_by_hand() -> None:
    model = beit()
    views = views_for(model)
    output = step(model, views)

    def put_in(_: object, __: object, patches_BND: torch.Tensor) -> torch.Tensor:
        by_hand = patches_BND.clone()
        for image, place in output.mask_BN.nonzero().tolist():
            by_hand[image, place] = model.mask_token[0, 0]
        return by_hand

    handle = model.backbone.patch_embed.register_forward_hook(put_in)
    features = model.backbone.forward_features(model.normalise(views.pixels_B3HW.float() / 255))
    handle.remove()
    rows = [features[i, 1 + n] @ model.head.weight.T + model.head.bias for i, n in output.mask_BN.nonzero()]
    torch.testing.assert_close(output.prediction, torch.stack(rows))


def test_loss__is_the_generators_of_cim_where_that_shares_every_block() -> None:
    """The same weights in both: encoder, mask token, class token, positions, norm, head."""
    model = beit()
    shared = model.enhancer.shared_layers(2)
    generator = SmallBEiT(
        GeneratorConfig(depth=2), image_size=32, patch_size=4, vocab_size=16, enhancer_width=32, shared=shared
    )
    backbone = model.backbone
    assert generator.pos_embed is not None
    with torch.no_grad():
        for ours, theirs in (
            (generator.mask_token, model.mask_token),
            (generator.cls_token, backbone.cls_token),
            (generator.pos_embed, backbone.pos_embed),
            (generator.norm.weight, backbone.norm.weight),
            (generator.lm_head.weight, model.head.weight),
        ):
            ours.copy_(theirs)
    views = views_for(model)
    output = step(model, views)
    logits = generator(model.normalise(output.clean_B3HW), output.mask_BN)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, output.golden_BN[output.mask_BN]))


def test_loss__is_the_mean_surprise_at_masked_positions() -> None:
    model = beit()
    views = views_for(model)
    with torch.no_grad():  # one token is named at almost every place, so that best and worst guess differ
        model.head.bias[int(model.tokenize(views.token_pixels_B3HW).mode().values[0])] = 0.3
    output = step(model, views)
    chances = output.prediction.softmax(dim=-1)
    golden = [int(output.golden_BN[i, n]) for i, n in output.mask_BN.nonzero()]
    surprises = [-chances[row, token].log() for row, token in enumerate(golden)]
    torch.testing.assert_close(output.loss, torch.stack(surprises).mean())
    right = [int(chances[row].argmax()) == token for row, token in enumerate(golden)]
    assert output.metrics["mim_accuracy"].item() == pytest.approx(sum(right) / len(right))


def test_forward__what_a_masked_patch_shows_does_not_matter() -> None:
    model = beit().eval()
    views = views_for(model)
    before = step(model, views)
    side = model.config.patch_size
    masked = before.mask_BN.view(-1, 8, 8).repeat_interleave(side, 1).repeat_interleave(side, 2)
    changed = torch.where(masked[:, None], 255 - views.pixels_B3HW, views.pixels_B3HW)
    hidden = Views(pixels_B3HW=changed, token_pixels_B3HW=views.token_pixels_B3HW, ids_B2=views.ids_B2)
    assert torch.equal(step(model, hidden).prediction, before.prediction)
    shown = Views(
        pixels_B3HW=255 - views.pixels_B3HW, token_pixels_B3HW=views.token_pixels_B3HW, ids_B2=views.ids_B2
    )
    assert not torch.equal(step(model, shown).prediction, before.prediction)


def test_masks__are_beits_blocks_of_75_of_196() -> None:
    config = peer_config("beit", image_size=56).resolved
    model = tiny_peer(config)
    assert (config.masking.strategy, config.masking.block_min_cells) == ("block", 16)
    counts = model(views_for(model, num_images=8), generator=rng()).mask_BN.sum(dim=1)
    assert counts.max() <= 75
    assert counts.float().mean() > 70


def test_columns__show_the_decoded_guess_in_place_of_masked_tokens() -> None:
    model = beit()
    output = step(model, views_for(model))
    columns = model.columns(output)
    assert list(columns) == ["original", "masked", "decoded"]
    golden = model.tokenizer.decode(output.golden_BN.view(-1, 8, 8))
    differs = (columns["decoded"] - golden).abs().amax(dim=1)
    differs_BN = F.max_pool2d(differs, 4).flatten(1) > 1e-6
    guessed_M = output.prediction.argmax(dim=-1)
    wrong_BN = torch.zeros_like(output.mask_BN)
    wrong_BN[output.mask_BN] = guessed_M != output.golden_BN[output.mask_BN]
    assert torch.equal(differs_BN, wrong_BN)


def test_beside_cim__masks_of_the_same_share_cost_what_the_configuration_says() -> None:
    cim = ModelConfig(
        tokenizer=TokenizerSource(source="fake"),
        enhancer=peer_config("beit").enhancer,
        objective=ObjectiveConfig(name="respix"),
        image_size=32,
        patch_size=4,
    ).resolved
    same = MaskingConfig(strategy="random", min_ratio=cim.masking.min_ratio, max_ratio=cim.masking.max_ratio)
    model = tiny_peer(peer_config("beit", masking=same))
    counts = model(views_for(model, num_images=50), generator=rng()).mask_BN.sum(dim=1)
    assert counts.min() >= round(0.51 * 64)
    assert counts.max() <= round(0.61 * 64)
