"""Fixtures of the tests of the command line."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from service import client as client_module
from service.cli.main import app
from service.client import Client
from tests.fakes.scripted import Clock, Server

Run = Callable[..., Result]


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every address that a command connected to."""
    return []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> Run:
    """Run `cim ARGUMENTS` against a scripted server."""

    def invoke(server: Server | None, *arguments: str, stdin: str | None = None) -> Result:
        def connected(url: str, **options: Any) -> Client:
            addresses.append(url)
            transport = httpx.MockTransport(server or Server(httpx.Response(500)))
            return Client(url, backoff=Clock().backoff(), transport=transport, **options)

        monkeypatch.setattr(client_module, "Client", connected)
        monkeypatch.setattr("service.cli.watch.POLL_S", 0.0)
        return CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)

    return invoke
