"""`source: dall-e` through the whole service: files in OpenAI's format in, an encoder out."""

import hashlib
from pathlib import Path

import pytest

from tests.acceptance.embedded import Embedded, specs
from tests.unit.cim_core.official_files import write_official


@pytest.mark.slow
def test_official__files_are_converted_once_and_their_checksums_told(
    embedded: Embedded, tmp_path: Path
) -> None:
    encoder, decoder = write_official(tmp_path)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (encoder, decoder)}
    spec = specs.pretrain("official", "dall-e", enhancer=specs.VIT, objective="revdet", steps=10)
    spec["model"]["tokenizer"] |= {
        "encoder": str(encoder),
        "decoder": str(decoder),
        "encoder_sha256": sums["encoder.pkl"],
    }
    (job,) = embedded.client.submit([spec])
    job = embedded.finished(job.id)

    assert job.state == "succeeded", job.reason
    card = embedded.client.read(job.id, "encoder/README.md").decode()
    assert all(checksum in card for checksum in sums.values())


@pytest.mark.slow
def test_official__a_file_with_another_checksum_ends_the_job_with_a_sentence(
    embedded: Embedded, tmp_path: Path
) -> None:
    encoder, decoder = write_official(tmp_path)
    spec = specs.pretrain("another-file", "dall-e", enhancer=specs.VIT, objective="revdet", steps=10)
    spec["model"]["tokenizer"] |= {
        "encoder": str(encoder),
        "decoder": str(decoder),
        "encoder_sha256": "0" * 64,
    }
    (job,) = embedded.client.submit([spec])
    job = embedded.finished(job.id)

    assert (job.state, job.failure_kind) == ("failed", "user")
    assert "encoder_sha256" in job.reason
    assert len(job.attempts) == 1
