"""Corrupted Image Modeling (arXiv 2202.03382): one training step, to be read from top to bottom.

Shape letters in this file:
    B  images on this rank            H, W  image height and width, pixels (image_size)
    g  token positions a side         N  token positions of an image, g * g
    M  masked positions of all B images together
    V  vocabulary of the tokenizer    D  enhancer width      h  its feature positions a side
    T  side of the tokenizer's images, pixels: g * stride

Images are uint8 as data and float in [0, 1] inside; only the two networks see ImageNet-normalised
ones. A frozen tokenizer and a small trainable BEiT make a corrupted image of each original; the
enhancer, the network that is wanted, learns to undo or to find the corruption.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.config import ModelConfig
from cim_core.data.dataset import Views
from cim_core.engine.transfer import send
from cim_core.masking import make_mask, masked_positions
from cim_core.models.generator import SmallBEiT
from cim_core.objectives.base import ObjectiveOutput, Truth
from cim_core.pretraining import Pretraining, build, greyed, to_unit
from cim_core.registry import DEFAULT_WEIGHTS, build_objective
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.portions import in_portions

_LAST_TITLE = {"respix": "restored", "revdet": "found replaced"}


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The loss and every intermediate that it came from; metrics stay on the device."""

    loss: Tensor
    losses: dict[str, Tensor]  # unweighted terms by name
    metrics: dict[str, Tensor]
    golden_BN: Tensor  # the tokenizer's tokens of the original
    mask_BN: Tensor
    sampled_BN: Tensor  # golden tokens, overwritten by samples where masked
    replaced_BN: Tensor  # masked and sampled != golden
    logits_MV: Tensor
    clean_B3HW: Tensor  # [0, 1]
    corrupted_B3HW: Tensor  # [0, 1]
    prediction: Tensor  # respix: normalised pixels [B, 3, H, W]; revdet: logits [B, N]


class CIM(Pretraining):
    """Generator, enhancer and objective around a frozen tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        config = self.config
        assert config.generator is not None
        assert config.objective is not None
        assert config.interpolation is not None
        num_shared = config.enhancer.shared_blocks
        if num_shared is None:
            num_shared = self.enhancer.default_shared_blocks(config.generator)
        self.generator = SmallBEiT(
            config.generator,
            image_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=tokenizer.vocab_size,
            enhancer_width=self.enhancer.width if self.enhancer.is_vit else None,
            shared=self.enhancer.shared_layers(num_shared),
        )
        self.objective = build_objective(
            config.objective,
            width=self.enhancer.width,
            feature_side=self.enhancer.side,
            image_size=config.image_size,
            grid=config.grid,
        )
        self.objective_name = config.objective.name
        self.weight = config.objective.weight or DEFAULT_WEIGHTS[config.objective.name]
        self.temperature = config.generator.temperature
        self.interpolation = config.interpolation

    def forward(self, views: Views, *, generator: torch.Generator) -> StepOutput:
        """One step on one batch; every random choice is `generator`'s (a CPU generator serves any device)."""
        # 1. Two views of one crop: the original, and the tokenizer's.
        clean_B3HW = to_unit(views.pixels_B3HW)
        # 2. Golden tokens.
        golden_BN = self.tokenize(views.token_pixels_B3HW)
        # 3. A mask of its own for every image, and the places in it that are masked.
        mask_BN = make_mask(len(golden_BN), self.grid, self.config.masking, generator)
        mask_BN, positions_M = (send(x, golden_BN.device) for x in (mask_BN, masked_positions(mask_BN)))
        # 4. The small BEiT proposes tokens for masked positions, of which it sees nothing.
        logits_MV = self.generator(self.normalise(clean_B3HW), mask_BN, positions_M).float()
        golden_M = golden_BN.take(positions_M)
        log_probabilities_MV = logits_MV.log_softmax(dim=-1)
        mim_loss = F.nll_loss(log_probabilities_MV, golden_M)
        # 5. Its samples replace the golden tokens there.
        sampled_M = sample_tokens(logits_MV, self.temperature, generator)
        sampled_BN = golden_BN.flatten().index_copy(0, positions_M, sampled_M).view_as(golden_BN)
        replaced_BN = mask_BN & (sampled_BN != golden_BN)
        # 6. The frozen decoder paints the corrupted image.
        corrupted_B3HW = self.corrupt(sampled_BN)
        # 7. The enhancer sees only that.
        features_BDhh = self.enhancer(self.normalise(corrupted_B3HW))
        truth = Truth(clean_B3HW=clean_B3HW, mask_BN=mask_BN, replaced_BN=replaced_BN)
        judged: ObjectiveOutput = self.objective(features_BDhh, truth)
        # 8. One loss for both networks; no gradient crosses the corrupted image.
        return StepOutput(
            loss=mim_loss + self.weight * judged.loss,
            losses={"mim": mim_loss, self.objective_name: judged.loss},
            metrics={
                "mim_loss": mim_loss.detach(),
                "enhancer_loss": judged.loss.detach(),
                **generator_metrics(log_probabilities_MV.detach(), golden_M, sampled_M),
                "mask_share": mask_BN.float().mean(),
                "replaced_share": replaced_BN.float().mean(),
                **judged.metrics,
            },
            golden_BN=golden_BN,
            mask_BN=mask_BN,
            sampled_BN=sampled_BN,
            replaced_BN=replaced_BN,
            logits_MV=logits_MV,
            clean_B3HW=clean_B3HW,
            corrupted_B3HW=corrupted_B3HW,
            prediction=judged.prediction,
        )

    @torch.no_grad()
    def corrupt(self, tokens_BN: Tensor) -> Tensor:
        """The decoder's image of the tokens, brought to image_size: [B, 3, H, W] in [0, 1]."""
        tokens_Bgg, token_side = tokens_BN.view(-1, self.grid, self.grid), self.grid * self.tokenizer.stride
        decoded_B3TT = in_portions(self.tokenizer.decode, tokens_Bgg, side=token_side).float()
        side = self.config.image_size
        if decoded_B3TT.shape[-1] != side:
            shrinks = decoded_B3TT.shape[-1] > side
            decoded_B3TT = F.interpolate(
                decoded_B3TT, size=(side, side), mode=self.interpolation, antialias=shrinks
            )
        # Bicubic overshoots at edges.
        return decoded_B3TT.clamp(0, 1)

    def columns(self, output: StepOutput) -> dict[str, Tensor]:
        """What a step did, as pictures under their titles; the last one is the enhancer's output."""
        clean_B3HW, corrupted_B3HW = output.clean_B3HW, output.corrupted_B3HW
        found = self.objective.picture(
            output.prediction, clean_B3HW=clean_B3HW, corrupted_B3HW=corrupted_B3HW
        )
        return {
            "original": clean_B3HW,
            "masked": greyed(clean_B3HW, output.mask_BN, self.grid),
            "corrupted": corrupted_B3HW,
            _LAST_TITLE[self.objective_name]: found,
        }


def build_cim(config: ModelConfig, tokenizer: Tokenizer, *, seed: int = 0) -> CIM:
    """A CIM model whose initial weights are a function of `seed`; torch's own generator is left alone.

    Raises ModelError or ConfigError where the configuration names what cannot be built.
    """
    return build(CIM, config, tokenizer, seed=seed)


@torch.no_grad()
def sample_tokens(logits_MV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one token a row from softmax(logits / temperature): [M], int64, in float32, no gradient.

    The parts of a row laid end to end, it is the token that a point drawn on them falls into: one random
    number a row, from the CPU as the masks. torch.multinomial takes one a token and makes a GPU wait.
    """
    ends_MV = (logits_MV.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    points_M = send(torch.rand(len(ends_MV), generator=generator), ends_MV.device)
    points_M1 = points_M[:, None] * ends_MV[:, -1:]  # rounded, the parts do not add up to 1 exactly
    tokens_M = torch.searchsorted(ends_MV, points_M1, right=True).squeeze(1)
    # Nothing lies beyond the last token but what is not a number, of which the loss will tell.
    return tokens_M.clamp_(max=ends_MV.shape[1] - 1)


@torch.no_grad()
def generator_metrics(log_probabilities_MV: Tensor, golden_M: Tensor, sampled_M: Tensor) -> dict[str, Tensor]:
    """How good and how sure the generator is at masked positions; entropy in nats."""
    return {
        "mim_accuracy": (log_probabilities_MV.argmax(dim=-1) == golden_M).float().mean(),
        "sample_accuracy": (sampled_M == golden_M).float().mean(),
        "entropy": -(log_probabilities_MV.exp() * log_probabilities_MV).sum(dim=-1).mean(),
    }
