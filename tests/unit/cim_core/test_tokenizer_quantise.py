"""Both quantisers against slow versions written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cim_core.config import TokenizerConfig
from cim_core.tokenizers import quantise
from cim_core.tokenizers.quantise import (
    RelaxedQuantiser,
    VectorQuantiser,
    kl_weight_at,
    nearest,
    temperature_at,
    usage,
)

VQ = TokenizerConfig(vocab_size=6, code_dim=3, stride=4, ema_decay=0.9, restart_below=0.0)
RELAXED = replace(VQ, quantiser="relaxed")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded_quantiser(config: TokenizerConfig = VQ, *, updates: int = 1000) -> VectorQuantiser:
    """In the middle of a training, so that no k-means happens and the decay is the configured one."""
    quantiser = VectorQuantiser(config).train()
    quantiser.initialise(generator=generator(1))
    quantiser.uses.copy_(torch.rand(config.vocab_size, generator=generator(2)) + 0.5)
    quantiser.updates.fill_(updates)
    return quantiser


def outputs(*, B: int = 4, side: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(B, 3, side, side, generator=generator(seed))


def test_nearest__brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(50, 3, generator=generator()), torch.randn(7, 3, generator=generator(1))
    monkeypatch.setattr(quantise, "DISTANCES_AT_ONCE", 7 * 8)  # portions of 8 rows, the last one of 2
    expected = [min(range(7), key=lambda v: float((row - codebook[v]).square().sum())) for row in z]
    assert nearest(z, codebook).tolist() == expected


def test_nearest__the_lower_id_wins_a_tie() -> None:
    assert nearest(torch.zeros(1, 2), torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist() == [1]


def test_nearest__in_float32_under_autocast() -> None:
    """Two entries that bfloat16, with its 8 bits, cannot tell apart."""
    codebook = torch.tensor([[1.0], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(torch.tensor([[1.0008], [1.0002]]), codebook).tolist() == [1, 0]


@pytest.mark.parametrize(("updates", "decay"), [(1000, 0.9), (20, 0.7)])
def test_vq__moving_averages_written_out(updates: int, decay: float) -> None:
    """At update 20 the decay is still (20 + 1) / (20 + 10); later it is the configured 0.9."""
    quantiser, z = seeded_quantiser(updates=updates), outputs()
    uses, codebook = quantiser.uses.tolist(), quantiser.codebook.double().clone()
    ids = quantiser.ids(z)
    quantiser(z, progress=0.5, generator=generator())
    for code in range(6):
        mine = [
            z[b, :, y, x].double()
            for b in range(4)
            for y in range(3)
            for x in range(3)
            if ids[b, y, x] == code
        ]
        new_uses = decay * uses[code] + (1 - decay) * len(mine)
        total = decay * uses[code] * codebook[code]
        for row in mine:
            total = total + (1 - decay) * row
        assert quantiser.uses[code].item() == pytest.approx(new_uses, rel=1e-5)
        torch.testing.assert_close(quantiser.codebook[code].double(), total / new_uses, rtol=1e-4, atol=1e-5)


def test_vq__code_is_the_nearest_entry_before_the_update() -> None:
    quantiser, z = seeded_quantiser(), outputs()
    before = quantiser.codebook.clone()
    result = quantiser(z, progress=0.0, generator=generator())
    expected = before[nearest(z.permute(0, 2, 3, 1).reshape(-1, 3), before)]
    torch.testing.assert_close(result.code_BDhw.permute(0, 2, 3, 1).reshape(-1, 3), expected)
    assert not torch.equal(before, quantiser.codebook)


def test_vq__gradient_goes_straight_through_and_commits() -> None:
    quantiser, z = seeded_quantiser(), outputs().requires_grad_()
    result = quantiser(z, progress=0.0, generator=generator())
    wanted = torch.randn(z.shape, generator=generator(9))
    (straight,) = torch.autograd.grad((result.code_BDhw * wanted).sum(), z, retain_graph=True)
    torch.testing.assert_close(straight, wanted)
    (commitment,) = torch.autograd.grad(result.loss, z)
    code = result.code_BDhw.detach()
    torch.testing.assert_close(commitment, 0.25 * 2 * (z.detach() - code) / z.numel())
    assert result.loss.item() == pytest.approx(0.25 * (z - code).square().mean().item(), rel=1e-5)


def test_vq__lookup_and_ids_are_inverse_on_the_codebook() -> None:
    quantiser = seeded_quantiser()
    ids = torch.tensor([[[0, 5], [3, 2]]])
    assert torch.equal(quantiser.ids(quantiser.lookup(ids)), ids)


def test_vq__first_batch_seeds_by_k_means() -> None:
    """Six well separated heaps; random rows would hit all six in 1.5 % of the cases only."""
    centres = 10 * torch.randn(6, 3, generator=generator(3))
    rows = centres.repeat_interleave(40, dim=0) + 0.01 * torch.randn(240, 3, generator=generator(4))
    order = torch.randperm(240, generator=generator(5))
    z = rows[order].view(1, 240, 1, 3).permute(0, 3, 1, 2)
    best = math.inf
    for seed in range(5):
        quantiser = VectorQuantiser(VQ).train()
        loss = quantiser(z, progress=0.0, generator=generator(seed)).metrics["commitment"].item()
        sample = rows[order][torch.randperm(240, generator=generator(seed))[:6]]
        unrefined = (rows[order] - sample[nearest(rows[order], sample)]).square().mean().item()
        assert loss <= unrefined
        best = min(best, loss)
    assert best < 5.0
    assert quantiser.updates == 1


def test_vq__dead_codes_restart_from_the_batch() -> None:
    """36 tokens for 6 codes: an even use is 6 a step, so the bar stands at 0.6."""
    quantiser, z = seeded_quantiser(replace(VQ, restart_below=0.1)), outputs()
    quantiser.codebook[2:4] = 1e3  # so far away that nothing is nearest to them
    quantiser.uses.fill_(6.0)
    quantiser.uses[2:4] = torch.tensor([0.61, 0.7]) / 0.9  # just above the bar after the decay by 0.9
    assert quantiser(z, progress=0.0, generator=generator()).metrics["restarts"] == 0
    quantiser.codebook[2:4] = 1e3
    assert quantiser(z, progress=0.0, generator=generator()).metrics["restarts"] == 1
    assert quantiser.uses[2].item() == pytest.approx(1.2)
    quantiser.codebook[2:4] = 1e3
    quantiser.uses[2:4] = 0.1
    assert quantiser(z, progress=0.0, generator=generator()).metrics["restarts"] == 2
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    distances = torch.cdist(quantiser.codebook, rows, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.min(dim=1).values == 0).tolist() == [False, False, True, True, False, False]
    assert not torch.equal(quantiser.codebook[2], quantiser.codebook[3])


def test_vq__eval_mode_moves_nothing() -> None:
    quantiser = seeded_quantiser().eval()
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    quantiser(outputs(), progress=0.0, generator=generator())
    assert all(torch.equal(before[name], value) for name, value in quantiser.state_dict().items())


def test_usage__even_and_single() -> None:
    even = usage(torch.full((8,), 3.0))
    assert even["perplexity"].item() == pytest.approx(8)
    assert even["codes_used"] == 1
    single = usage(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    assert single["perplexity"].item() == pytest.approx(1)
    assert single["codes_used"] == 0.25


def relaxed(config: TokenizerConfig = RELAXED) -> RelaxedQuantiser:
    quantiser = RelaxedQuantiser(config).train()
    quantiser.initialise(generator=generator())
    return quantiser


def test_relaxed__kl_written_out() -> None:
    quantiser = relaxed()
    z = torch.randn(2, 6, 2, 2, generator=generator())
    result = quantiser(z, progress=1.0, generator=generator())
    total = 0.0
    for b in range(2):
        for y in range(2):
            for x in range(2):
                q = (8 * z[b, :, y, x].double()).softmax(dim=0)  # 8: the gain
                total += sum(float(p * torch.log(p / (1 / 6))) for p in q)
    assert result.metrics["kl"].item() == pytest.approx(total / 8, rel=1e-5)
    # Loss in nats a colour value: a token stands for 4 x 4 x 3 of them.
    assert result.loss.item() == pytest.approx(6.6 * total / 8 / 48, rel=1e-5)


def test_relaxed__lookup_is_the_convolution_of_one_hot_maps() -> None:
    quantiser = relaxed()
    assert quantiser.embedding.bias is not None
    torch.nn.init.normal_(quantiser.embedding.bias, generator=generator(3))
    ids = torch.randint(6, (2, 3, 3), generator=generator())
    one_hot = torch.nn.functional.one_hot(ids, 6).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(quantiser.lookup(ids), quantiser.embedding(one_hot))


def test_relaxed__samples_follow_the_softmax() -> None:
    """Gumbel's theorem: the arg-max of noisy logits is drawn from the softmax of the logits."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    many = logits.view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    sample = quantise._gumbel_softmax(many, temperature=0.5, generator=generator())
    torch.testing.assert_close(sample.sum(dim=1), torch.ones(20_000, 1, 1))
    shares = sample.argmax(dim=1).flatten().bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, logits.softmax(dim=0), atol=0.015, rtol=0)


def test_relaxed__cold_samples_are_nearly_one_hot() -> None:
    logits = torch.randn(100, 6, 1, 1, generator=generator())
    warm = quantise._gumbel_softmax(logits, temperature=1.0, generator=generator(1))
    cold = quantise._gumbel_softmax(logits, temperature=1 / 16, generator=generator(1))
    assert warm.amax(dim=1).mean() < 0.8 < 0.95 < cold.amax(dim=1).mean()


def test_relaxed__eval_mode_takes_the_likeliest() -> None:
    quantiser = relaxed().eval()
    logits = torch.randn(2, 6, 2, 2, generator=generator())
    result = quantiser(logits, progress=0.3, generator=generator())
    assert torch.equal(result.ids_Bhw, logits.argmax(dim=1))
    torch.testing.assert_close(result.code_BDhw, quantiser.lookup(result.ids_Bhw))


def test_schedules__ends_and_middle() -> None:
    config = replace(RELAXED, temperature_start=1.0, temperature_end=0.2, kl_weight=4.8, kl_warmup=0.5)
    assert [temperature_at(p, config) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    assert [kl_weight_at(p, config) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.05, 0.1, 0.1])
    at_once = replace(config, kl_warmup=0.0)
    assert kl_weight_at(0.0, at_once) == pytest.approx(0.1)


@pytest.mark.parametrize("config", [VQ, RELAXED], ids=["vq", "relaxed"])
def test_quantisers__same_generator_same_result_and_the_global_one_stays(config: TokenizerConfig) -> None:
    before = torch.get_rng_state()
    codes = []
    for _ in range(2):
        quantiser = quantise.QUANTISERS[config.quantiser](config).train()
        quantiser.initialise(generator=generator(1))
        z = torch.randn(4, quantiser.num_inputs, 3, 3, generator=generator())
        codes.append(quantiser(z, progress=0.1, generator=generator(2)).code_BDhw)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(before, torch.get_rng_state())
