"""Estimates as people read them."""

import pytest

from service.cli.estimates import estimate_lines, short
from service.contracts.estimates import Estimate
from tests.fakes.costs import COST


def test_lines__in_units_of_people() -> None:
    estimate = Estimate(
        name="enc",
        workers=8,
        cpus=64,
        gpus=8,
        steps=187_672,
        images=384_352_256,
        epochs=300,
        files=1_281_167,
        depends_on="how many are pictures",
        images_per_pass=64,
        precision="bf16",
        cost=COST,
    )
    assert list(estimate_lines(estimate)) == [
        "resources: workers 8, CPUs 64, GPUs 8",
        "length: 187,672 steps, 384,352,256 images, 1,281,167 files, 300 epochs",
        "still open: how many are pictures",
        "parameters: 126 M (enhancer 21.7 M, generator 6.78 M, head 296 k, tokenizer 97.6 M)",
        (
            "MACs of an image, forward: 61.9 G (enhancer 4.6 G, generator 1.92 G, head 57.8 M, "
            "tokenizer encode 26.1 G, tokenizer decode 29.3 G)"
        ),
        "MACs of an image, in a training step: 75.1 G",
        (
            "memory of a worker: 7.0 GiB at most, at 64 images a pass, bf16; model 109.7 MiB, tokenizer "
            "372.4 MiB, gradients 109.7 MiB, optimizer 219.3 MiB, activations 6.3 GiB; in the host's "
            "memory a checkpoint's copy of 329.0 MiB"
        ),
    ]
    on_cpus = list(estimate_lines(estimate.model_copy(update={"gpus": 0})))
    assert on_cpus[-1].endswith("optimizer 219.3 MiB, activations 6.3 GiB, snapshot 329.0 MiB")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (4.6e9, "4.6 G"), (2e13, "20 T")],
)
def test_short__three_digits_and_a_unit(value: float, text: str) -> None:
    assert short(value) == text
