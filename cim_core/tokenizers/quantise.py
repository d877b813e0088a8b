"""From the encoder's output to a code and its id: `vq` or `relaxed`.

`VectorQuantiser`: nearest entry of a codebook that follows the encoder by moving averages
(van den Oord et al., 2017, appendix A.1), seeded by k-means and with restarts of dead codes.
`RelaxedQuantiser`: the Gumbel-softmax of the DALL-E dVAE (Ramesh et al., 2021, appendix A.2).

Shape letters in this file:
    B  images on this rank       h, w  tokens a side      N  tokens on this rank, B * h * w
    V  entries of the codebook   D  channels of a code    S  tokens on all ranks

Everything that training changes lies in parameters and buffers, so a state dict holds all of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, log, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cim_core.config import TokenizerConfig
from cim_core.engine import dist
from cim_core.tokenizers.network import empty_conv

KMEANS_ROUNDS = 10
LOGIT_GAIN = 8.0  # relaxed
# Rows of the distance table are worked off in portions of at most this many numbers (64 MiB).
DISTANCES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of one batch while training."""

    code_BDhw: Tensor
    ids_Bhw: Tensor
    loss: Tensor  # weighted; commitment (vq) or KL in nats a colour value (relaxed)
    metrics: dict[str, Tensor]


class VectorQuantiser(nn.Module):
    """Nearest codebook entry, straight-through gradient, codebook by moving averages."""

    codebook: Tensor
    uses: Tensor
    updates: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.num_inputs = config.code_dim
        self._config = config
        self.register_buffer("codebook", torch.zeros(config.vocab_size, config.code_dim))
        self.register_buffer("uses", torch.zeros(config.vocab_size))  # moving average, tokens a step
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # 0: not yet seeded

    def initialise(self, *, generator: torch.Generator) -> None:
        """Draw a codebook that an untrained tokenizer can live with; the first batch replaces it."""
        self.codebook.copy_(torch.randn(self.codebook.shape, generator=generator))

    def ids(self, z_BDhw: Tensor) -> Tensor:
        """Ids [B, h, w] of the entries nearest to the encoder's output."""
        B, _, h, w = z_BDhw.shape
        return nearest(_rows(z_BDhw), self.codebook).view(B, h, w)

    def lookup(self, ids_Bhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] of ids."""
        return F.embedding(ids_Bhw, self.codebook).permute(0, 3, 1, 2)

    def forward(self, z_BDhw: Tensor, *, progress: float, generator: torch.Generator) -> Quantised:
        """Quantise [B, D, h, w]; in training mode the codebook then moves towards what it stood for.

        `progress` has no meaning here. `generator` picks seeds and restarts; rank 0's picks count.
        """
        del progress
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_ND = _rows(z_BDhw)
            if self.training and self.updates == 0:
                self._seed(z_ND.detach(), generator=generator)
            ids_N = nearest(z_ND, self.codebook)
            code_ND = self.codebook[ids_N]
            commitment = F.mse_loss(z_ND, code_ND)
            B, D, h, w = z_BDhw.shape
            straight_ND = z_ND + (code_ND - z_ND).detach()
            code_BDhw = straight_ND.view(B, h, w, D).permute(0, 3, 1, 2)
            sums_VD, counts_V = _sums(z_ND.detach(), ids_N, num_codes=len(self.codebook))
            restarts = self._follow(z_ND.detach(), sums_VD, counts_V, generator=generator)
        metrics = {"commitment": commitment.detach(), "restarts": restarts} | usage(counts_V)
        return Quantised(code_BDhw, ids_N.view(B, h, w), self._config.commitment * commitment, metrics)

    @torch.no_grad()
    def _seed(self, z_ND: Tensor, *, generator: torch.Generator) -> None:
        """k-means on the first batch, so that no code starts far from all data."""
        self.codebook.copy_(_random_rows(z_ND, num=len(self.codebook), generator=generator))
        for _ in range(KMEANS_ROUNDS):
            ids_N = nearest(z_ND, self.codebook)
            sums_VD, counts_V = _sums(z_ND, ids_N, num_codes=len(self.codebook))
            means_VD = sums_VD / counts_V.clamp(min=1)[:, None]
            self.codebook.copy_(torch.where(counts_V[:, None] > 0, means_VD, self.codebook))
            self.uses.copy_(counts_V)

    @torch.no_grad()
    def _follow(
        self, z_ND: Tensor, sums_VD: Tensor, counts_V: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Move the averages by one step and re-seed dead codes; returns how many were dead."""
        if not self.training:
            return torch.zeros((), device=z_ND.device)
        keep = self._decay()
        uses_V = keep * self.uses + (1 - keep) * counts_V
        moved_VD = (keep * self.uses)[:, None] * self.codebook + (1 - keep) * sums_VD
        # An entry without any weight, old or new, has no mean: it stays where it is.
        has_mean = uses_V > torch.finfo(uses_V.dtype).tiny
        codebook_VD = torch.where(
            has_mean[:, None], moved_VD / uses_V.clamp(min=1e-37)[:, None], self.codebook
        )
        bar = self._config.restart_below * counts_V.sum() / len(counts_V)
        dead_V = uses_V < bar
        # Drawn whether needed or not: asking first would make the GPU wait for the CPU.
        fresh_VD = _random_rows(z_ND, num=len(self.codebook), generator=generator)
        self.codebook.copy_(torch.where(dead_V[:, None], fresh_VD, codebook_VD))
        # Little weight: it moves to the mean of what it attracts, or is soon tried elsewhere.
        self.uses.copy_(torch.where(dead_V, 2 * bar, uses_V))
        self.updates += 1
        return dead_V.sum().float()

    def _decay(self) -> Tensor:
        """Short averages at first: the encoder runs away from a codebook with a memory of 100 steps."""
        return ((self.updates + 1) / (self.updates + 10)).clamp(max=self._config.ema_decay)


class RelaxedQuantiser(nn.Module):
    """A softmax over the codes with Gumbel noise, sharper and sharper; the arg-max when frozen.

    The embedding is the first layer of DALL-E's decoder: a 1x1 convolution of one-hot maps. The logits
    are the encoder's output times LOGIT_GAIN: an untrained encoder's are smaller than the noise, and
    then the codebook collapses before it says anything (docs/lab-log.md).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.num_inputs = config.vocab_size
        self._config = config
        self.embedding = empty_conv(config.vocab_size, config.code_dim, kernel=1)

    def initialise(self, *, generator: torch.Generator) -> None:
        """Draw the embedding; unlike a convolution's input, one-hot maps have a single one."""
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(self.embedding.weight.shape, generator=generator))
            assert self.embedding.bias is not None
            self.embedding.bias.zero_()

    def ids(self, logits_BVhw: Tensor) -> Tensor:
        """Ids [B, h, w] of the likeliest codes."""
        return logits_BVhw.argmax(dim=1)

    def lookup(self, ids_Bhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] of ids."""
        weight_VD = self.embedding.weight[:, :, 0, 0].t()
        assert self.embedding.bias is not None
        code_BhwD: Tensor = F.embedding(ids_Bhw, weight_VD) + self.embedding.bias
        return code_BhwD.permute(0, 3, 1, 2)

    def forward(self, z_BVhw: Tensor, *, progress: float, generator: torch.Generator) -> Quantised:
        """Blend the codes [B, D, h, w] by a noisy softmax (training) or take the likeliest (otherwise).

        `progress` in [0, 1] drives the temperature and the weight of the KL to the uniform prior.
        """
        config = self._config
        with torch.autocast(z_BVhw.device.type, enabled=False):
            logits_BVhw = LOGIT_GAIN * z_BVhw.float()
            ids_Bhw = self.ids(logits_BVhw)
            log_q_BVhw = logits_BVhw.log_softmax(dim=1)
            kl = (log_q_BVhw.exp() * (log_q_BVhw + log(config.vocab_size))).sum(dim=1).mean()
            temperature = temperature_at(progress, config)
            code_BDhw = (
                self.embedding(_gumbel_softmax(logits_BVhw, temperature=temperature, generator=generator))
                if self.training
                else self.lookup(ids_Bhw)
            )
            counts_V = dist.all_reduce_sum(_count(ids_Bhw.flatten(), num_codes=config.vocab_size))
        metrics = {"kl": kl.detach(), "temperature": kl.new_tensor(temperature)} | usage(counts_V)
        return Quantised(code_BDhw, ids_Bhw, kl_weight_at(progress, config) * kl, metrics)


Quantiser = VectorQuantiser | RelaxedQuantiser
QUANTISERS: Mapping[str, Callable[[TokenizerConfig], Quantiser]] = {
    "vq": VectorQuantiser,
    "relaxed": RelaxedQuantiser,
}


def nearest(z_ND: Tensor, codebook_VD: Tensor) -> Tensor:
    """Ids [N] of the codebook entries at the smallest Euclidean distance; the lower id wins a tie."""
    with torch.no_grad(), torch.autocast(z_ND.device.type, enabled=False):
        codes_DV = codebook_VD.float().t()
        half_norms_V = codes_DV.square().sum(dim=0) / 2
        portion = max(1, DISTANCES_AT_ONCE // len(codebook_VD))
        # |z - c|^2 / 2 without |z|^2 / 2, which is the same for all entries.
        parts = [
            (half_norms_V - z_MD @ codes_DV).argmin(dim=1) for z_MD in torch.split(z_ND.float(), portion)
        ]
        return torch.cat(parts)


def usage(counts_V: Tensor) -> dict[str, Tensor]:
    """Share of the codes in use and the perplexity of how often each is used, from counts [V]."""
    p_V = counts_V / counts_V.sum().clamp(min=1)
    entropy = -torch.xlogy(p_V, p_V).sum()
    return {"codes_used": (counts_V > 0).float().mean(), "perplexity": entropy.exp()}


def temperature_at(progress: float, config: TokenizerConfig) -> float:
    """Temperature of the Gumbel-softmax: a half cosine from the start value to the end value."""
    return _cosine(config.temperature_start, config.temperature_end, progress)


def kl_weight_at(progress: float, config: TokenizerConfig) -> float:
    """Weight of a token's KL beside a loss in nats a colour value.

    The paper's 6.6 belongs to the KL summed over tokens, the whole divided by the number of colour
    values: 3 * stride^2 a token.
    """
    share = progress / config.kl_warmup if config.kl_warmup else 1.0
    return _cosine(0.0, config.kl_weight, share) / (3 * config.stride**2)


def _rows(z_BDhw: Tensor) -> Tensor:
    return z_BDhw.float().permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])


def _count(ids_N: Tensor, *, num_codes: int) -> Tensor:
    return torch.bincount(ids_N, minlength=num_codes).float()


def _sums(z_ND: Tensor, ids_N: Tensor, *, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sum [V, D] and number [V] of the rows of each id, over all ranks."""
    D = z_ND.shape[1]
    sums_VD = z_ND.new_zeros(num_codes, D).index_add_(0, ids_N, z_ND)
    counts_V = _count(ids_N, num_codes=num_codes)
    both = dist.all_reduce_sum(torch.cat([sums_VD, counts_V[:, None]], dim=1))
    return both[:, :D], both[:, D]


def _random_rows(z_ND: Tensor, *, num: int, generator: torch.Generator) -> Tensor:
    """`num` rows [num, D] of all ranks' rows, different ones where there are enough, equal on all ranks.

    Rank 0 picks; each rank fills in the rows it holds. One process picks the same from the joined rows.
    """
    counts = dist.row_counts(z_ND)
    order_S = torch.randperm(sum(counts), generator=generator, device=generator.device).to(z_ND.device)
    picks = dist.broadcast_from_0(order_S.repeat(-(-num // len(order_S)))[:num])
    local = picks - sum(counts[: dist.rank()])
    mine = (local >= 0) & (local < len(z_ND))
    held = z_ND[local.clamp(0, len(z_ND) - 1)]
    return dist.all_reduce_sum(torch.where(mine[:, None], held, torch.zeros_like(held)))


def _gumbel_softmax(logits_BVhw: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    """A sample [B, V, h, w] of the relaxed one-hot distribution (Jang et al., 2017)."""
    device = logits_BVhw.device
    if device != generator.device:
        # Millions of draws belong on the device; one number from the given generator seeds them.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        generator = torch.Generator(device).manual_seed(seed)
    exponential = torch.empty_like(logits_BVhw, memory_format=torch.contiguous_format)
    exponential.exponential_(generator=generator).clamp_(min=torch.finfo(exponential.dtype).tiny)
    return ((logits_BVhw - exponential.log()) / temperature).softmax(dim=1)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + cos(pi * min(max(share, 0.0), 1.0))) / 2
