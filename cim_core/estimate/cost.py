"""What a training takes: parameters, multiply-accumulates, and the memory of one worker.

Nothing is computed: the modules of the training are built without memory and run on fake tensors.

Shape letters in this file:
    B  images      N  token positions of an image      H, W  image sides, pixels
    T  side of the tokenizer's images, pixels          h, w  tokens a side
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cim_core.cim import CIM
from cim_core.config import (
    DALL_E,
    ModelConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import Views
from cim_core.estimate.dry_run import MemoryMeter, dry_run, fake_weights, multiplications
from cim_core.estimate.memory import MemoryCost, step_memory
from cim_core.masking import count_range
from cim_core.masking_config import MaskingConfig
from cim_core.methods import build_model
from cim_core.peers.base import Peer
from cim_core.pretraining import FAKE_SOURCE, Pretraining
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dalle import DalleConfig, dalle_on_meta
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.fake import FakeTokenizer

TRAINED = 3  # a forward pass, and a backward pass of twice its cost: for inputs and for weights


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one training takes, by part of the networks."""

    parameters: dict[str, int]  # each counted once: shared layers belong to the enhancer
    macs_per_image: dict[str, int]  # of a forward pass
    macs_per_training_image: int  # of a step: trained parts three times, frozen ones once
    memory_per_worker: MemoryCost


def pretrain_cost(
    model: ModelConfig,
    training: TrainingConfig,
    *,
    tokenizer: TokenizerConfig | None,
    num_workers: int = 1,
    on_gpu: bool = False,
) -> Cost:
    """The cost of pre-training `model`.

    Args:
        model: what is trained.
        training: portions of a step, and the precision, which must have been decided.
        tokenizer: sizes of the frozen tokenizer where `model.tokenizer` does not tell them (it does for
            `dall-e` and `fake`). None: its part is left out, and the vocabulary taken to be DALL-E's.
        num_workers: processes that share the batch.
        on_gpu: they compute there.

    Raises:
        ModelError, ConfigError: the model cannot be built.
    """
    # Where an image is masked has no influence, and blocks cannot be placed without numbers.
    model = replace(model, masking=replace(model.masking, strategy="random")).resolved
    with torch.device("meta"):
        frozen = None if model.tokenizer is None else _frozen_tokenizer(model.tokenizer, tokenizer)
        if frozen is not None and frozen.is_fake:
            model = replace(model, tokenizer=TokenizerSource(source=FAKE_SOURCE))
        built = build_model(model, frozen)
    token_size = built.token_size or 0
    with _on_fakes(built, frozen, masked_share=_masked_share(model.grid, model.masking)) as meter:
        macs = _cim_macs(built) if isinstance(built, CIM) else _peer_macs(built)
        memory = step_memory(
            built,
            lambda views: built(views, generator=torch.Generator()),
            lambda: _views(model.image_size, token_size, training.batch_size // num_workers),
            frozen=frozen,
            training=training,
            num_workers=num_workers,
            on_gpu=on_gpu,
            meter=meter,
        )
    frozen_macs = sum(value for part, value in macs.items() if part.startswith("tokenizer"))
    return Cost(
        parameters=_parameters(built),
        macs_per_image=macs,
        macs_per_training_image=TRAINED * (sum(macs.values()) - frozen_macs) + frozen_macs,
        memory_per_worker=memory,
    )


def tokenizer_cost(
    config: TokenizerConfig, training: TrainingConfig, *, num_workers: int = 1, on_gpu: bool = False
) -> Cost:
    """The cost of training a tokenizer; arguments as those of `pretrain_cost`."""
    with torch.device("meta"):
        model = DiscreteVAE(config, generator=torch.Generator())
    with _on_fakes(model) as meter:
        macs = _tokenizer_macs(model)
        memory = step_memory(
            model,
            lambda views: model(views.pixels_B3HW.float() / 255, progress=0.5, generator=torch.Generator()),
            lambda: _views(config.image_size, 0, training.batch_size // num_workers),
            frozen=None,
            training=training,
            num_workers=num_workers,
            on_gpu=on_gpu,
            meter=meter,
        )
    # The nearest entry of a codebook is looked for without gradient.
    once = macs["quantiser"] if config.quantiser == "vq" else 0
    parts = {"encoder": model.encoder, "quantiser": model.quantiser, "decoder": model.decoder}
    return Cost(
        parameters={name: _num_parameters(part) for name, part in parts.items()},
        macs_per_image=macs,
        macs_per_training_image=TRAINED * (sum(macs.values()) - once) + once,
        memory_per_worker=memory,
    )


@contextmanager
def _on_fakes(*modules: object, masked_share: float = 0.0) -> Iterator[MemoryMeter]:
    """A dry run in which these modules from the meta device have fake weights."""
    with dry_run(masked_share=masked_share) as meter:
        for module in modules:
            if isinstance(module, nn.Module):
                fake_weights(module)
        yield meter


def _frozen_tokenizer(source: TokenizerSource, sizes: TokenizerConfig | None) -> Tokenizer:
    if source.source == FAKE_SOURCE:
        return FakeTokenizer()
    if source.source == DALL_E:
        return dalle_on_meta(DalleConfig(), origin={})
    if sizes is None:
        return FakeTokenizer(vocab_size=DalleConfig().vocab_size)
    return DiscreteVAE(sizes, generator=torch.Generator())


def _masked_share(grid: int, masking: MaskingConfig) -> float:
    """Mean share of masked positions; counts are uniform between two ends."""
    return sum(count_range(grid, masking)) / 2 / grid**2


def _cim_macs(cim: CIM) -> dict[str, int]:
    """Of the forward pass of one image, by part."""
    side, grid, width = cim.config.image_size, cim.grid, cim.enhancer.width
    image_B3HW = torch.empty(1, 3, side, side)
    view_B3TT = torch.empty(1, 3, grid * cim.tokenizer.stride, grid * cim.tokenizer.stride)
    ids_Bhw = torch.empty(1, grid, grid, dtype=torch.int64)
    mask_BN = torch.empty(1, grid**2, dtype=torch.bool)
    features_BDhh = torch.empty(1, width, cim.enhancer.side, cim.enhancer.side)
    return {
        "enhancer": multiplications(lambda: cim.enhancer(image_B3HW)),
        "generator": multiplications(lambda: cim.generator(image_B3HW, mask_BN)),
        "head": multiplications(lambda: cim.objective.head(features_BDhh)),
        "tokenizer_encode": multiplications(lambda: cim.tokenizer.encode(view_B3TT)),
        "tokenizer_decode": multiplications(lambda: cim.tokenizer.decode(ids_Bhw)),
    }


def _peer_macs(model: Pretraining) -> dict[str, int]:
    """Likewise; the head, or decoder, is what is left of a whole pass."""
    assert isinstance(model, Peer)
    side = model.config.image_size
    image_B3HW, mask_BN = torch.empty(1, 3, side, side), torch.empty(1, model.grid**2, dtype=torch.bool)
    views = _views(side, model.token_size or 0, 1)
    macs = {"enhancer": multiplications(lambda: model.encode(image_B3HW, mask_BN))}
    if model.frozen is not None:
        view_B3TT = views.token_pixels_B3HW.float()
        macs["tokenizer_encode"] = multiplications(lambda: model.tokenizer.encode(view_B3TT))
    whole = multiplications(lambda: model(views, generator=torch.Generator()))
    return macs | {_head_of(model): whole - sum(macs.values())}


def _parameters(model: Pretraining) -> dict[str, int]:
    """By part; the mask token counts to the head."""
    encoder, frozen = _num_parameters(model.enhancer), _num_parameters(model.frozen)
    if isinstance(model, CIM):
        parts = {"generator": _num_parameters(model.generator), "head": _num_parameters(model.objective)}
    else:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = {_head_of(model): trained - encoder}
    return {"enhancer": encoder, **parts, **({} if model.frozen is None else {"tokenizer": frozen})}


def _head_of(model: Pretraining) -> str:
    return "decoder" if model.config.decoder is not None else "head"


def _tokenizer_macs(model: DiscreteVAE) -> dict[str, int]:
    """Of the forward pass of one image, by part."""
    config = model.config
    z_BChw = torch.empty(1, model.quantiser.num_inputs, config.grid, config.grid)
    code_BDhw = torch.empty(1, config.code_dim, config.grid, config.grid)
    generator = torch.Generator()
    return {
        "encoder": multiplications(
            lambda: model.encoder(torch.empty(1, 3, config.image_size, config.image_size))
        ),
        "quantiser": multiplications(lambda: model.quantiser(z_BChw, progress=0.5, generator=generator)),
        "decoder": multiplications(lambda: model.decoder(code_BDhw)),
    }


def _views(image_size: int, token_size: int, num_images: int) -> Views:
    def pixels(side: int) -> Tensor:
        return torch.empty(num_images, 3, side, side, dtype=torch.uint8)

    ids_B2 = torch.empty(num_images, 2, dtype=torch.int64)
    return Views(pixels_B3HW=pixels(image_size), token_pixels_B3HW=pixels(token_size), ids_B2=ids_B2)


def _num_parameters(module: object) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
