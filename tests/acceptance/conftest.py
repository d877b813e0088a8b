"""One embedded service for all acceptance tests, started as a user starts it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.embedded import Embedded, specs


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A running `cim up` on a data directory of its own."""
    service = Embedded(tmp_path_factory.mktemp("cim") / "data")
    service.start()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def tokenizer_name(embedded: Embedded) -> str:
    """The name of a tokenizer that was trained on the demo tiles."""
    (job,) = embedded.client.submit([specs.tokenizer("acceptance-tokenizer", steps=20)])
    assert embedded.finished(job.id).state == "succeeded"
    return job.name


@pytest.fixture(scope="session")
def tiles() -> Path:
    """The bundled photographs."""
    return specs.TRAIN_TAR
