from dataclasses import replace
from math import log

import pytest
import torch

from benchmarks.distillation import DistillationTask
from cim_core.config import TokenizerConfig
from cim_core.data.dataset import Views
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE

CONFIG = TokenizerConfig(image_size=16, stride=4, width=4, vocab_size=6, code_dim=8, quantiser="relaxed")


def tokenizer(seed: int, *, width: int = 4) -> DiscreteVAE:
    made = DiscreteVAE(replace(CONFIG, width=width), generator=generator_for(seed, "init", "tokenizer"))
    return made.eval()


@pytest.fixture
def views() -> Views:
    pixels_B3HW = torch.randint(256, (2, 3, 16, 16), generator=generator_for(0, "pixels"), dtype=torch.uint8)
    ids_B2 = torch.zeros(2, 2, dtype=torch.int64)
    return Views(ids_B2=ids_B2, pixels_B3HW=pixels_B3HW, token_pixels_B3HW=pixels_B3HW[..., :0, :0])


def test_losses__token_by_token_and_pixel_by_pixel(views: Views) -> None:
    teacher, student = tokenizer(1), tokenizer(2, width=2)
    output = DistillationTask(student, teacher).losses(views, step=0, micro=0, rank=0, progress=0.0)
    images_B3HW = views.pixels_B3HW / 255
    ids_Bhw = teacher.encode(images_B3HW)
    with torch.no_grad():
        logits_BVhw = 8 * student.encoder(0.8 * images_B3HW + 0.1)
        picture_B3HW = (student.decoder(student.quantiser.lookup(ids_Bhw))[:, :3].sigmoid() - 0.1) / 0.8
    surprises = [
        -logits_BVhw[b, :, y, x].softmax(dim=0)[ids_Bhw[b, y, x]].log().item()
        for b in range(2)
        for y in range(4)
        for x in range(4)
    ]
    error = float((picture_B3HW - teacher.decode(ids_Bhw)).square().mean())
    assert float(output.metrics["tokens"]) == pytest.approx(sum(surprises) / 32, rel=1e-5)
    assert float(output.metrics["pixels"]) == pytest.approx(error, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(surprises) / 32 + log(error) / 2, rel=1e-5)


def test_losses__teach_both_halves_of_the_student_and_nothing_of_the_teacher(views: Views) -> None:
    teacher, student = tokenizer(1), tokenizer(2, width=2)
    output = DistillationTask(student, teacher).losses(views, step=0, micro=0, rank=0, progress=0.0)
    output.loss.backward()  # type: ignore[no-untyped-call]
    untrained = [name for name, value in student.named_parameters() if value.grad is None]
    assert untrained == []
    assert all(value.grad is None for value in teacher.parameters())
