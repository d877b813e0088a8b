"""The api is reached over loopback alone, and answers only to who means it."""

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.contracts.problems import Problem
from service.local_servers import MlflowServer, RayHead
from service.serving import listen
from tests.fakes.world import World

PUBLIC = "api.test"  # the host of public_url
OURS = [
    PUBLIC,
    "API.test:8000",
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost:1",
    "LocalHost",
    "[::1]:8000",
    "[::1]",
]
STRANGERS = [
    "evil.net",
    "evil.net:8000",
    "127.0.0.1.evil.net",
    "localhost.evil.net",
    "api.test.evil.net",
    "127.0.0.1@evil.net",
    "evil.net/127.0.0.1",
    "evil@127.0.0.1",
    "127.0.0.1 evil.net",
    "192.168.1.7",
    "0.0.0.0",
    "[::]",
    "[",
    "",
]
ADDRESSES = ["/healthz", "/docs", "/v1/jobs", "/openapi.json", "/nowhere", "/v1/jobs/%00"]


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return Problem.model_validate_json(answer.content).detail


@pytest.mark.parametrize("host", OURS)
async def test_host__our_own_names_are_answered(world: World, host: str) -> None:
    assert (await world.client.get("/healthz", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", STRANGERS)
async def test_host__another_name_is_refused_everywhere(world: World, host: str) -> None:
    for address in ADDRESSES:
        told = refusal(await world.client.get(address, headers={"Host": host}), 421)
        assert "CIM_PUBLIC_URL" in told
        assert host in told
    assert (await world.client.post("/v1/jobs", json=world.tokenizer(), headers={"Host": host})).is_error
    assert (await world.client.get("/v1/jobs")).json()["jobs"] == []


async def test_host__two_of_them_or_none_are_refused(world: World) -> None:
    two = httpx.Headers([("Host", PUBLIC), ("Host", "evil.net")])
    for headers in (two, httpx.Headers([("Host", "evil.net"), ("Host", PUBLIC)])):
        request = world.client.build_request("GET", "/healthz")
        request.headers = headers
        refusal(await world.client.send(request), 421)
    del request.headers["Host"]
    assert "names nothing" in refusal(await world.client.send(request), 421)


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost", "https://api.test"])
async def test_origin__our_own_pages_may_ask(world: World, origin: str) -> None:
    await world.submit(world.tokenizer())
    answer = await world.client.post("/v1/jobs/tok/cancel", headers={"Origin": origin})
    assert answer.status_code == 202


@pytest.mark.parametrize("origin", ["https://evil.net", "null", "http://127.0.0.1.evil.net", "http://[", ""])
async def test_origin__a_page_of_another_site_may_not(world: World, origin: str) -> None:
    await world.submit(world.tokenizer())
    answer = await world.client.post("/v1/jobs/tok/cancel", headers={"Origin": origin})
    assert "answers only to" in refusal(answer, 403)
    assert (await world.show("tok"))["state"] == "queued"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listen__is_on_loopback(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as bound:
        assert ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def test_listen__its_connections_send_at_once() -> None:
    # Else the head of a short answer waits for the client's acknowledgement, 40 ms.
    with (
        listen("127.0.0.1", 0) as bound,
        socket.create_connection(bound.getsockname()),
        bound.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_listen__a_name_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_server", lambda *_, **__: _Elsewhere())
    with pytest.raises(OSError, match="not loopback"):
        listen("localhost", 0)
    assert _Elsewhere.closed


class _Elsewhere:
    """A socket, as a strange /etc/hosts would have it."""

    closed = False

    def getsockname(self) -> tuple[str, int]:
        return ("192.168.1.7", 8000)

    def close(self) -> None:
        _Elsewhere.closed = True


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("command", ["api", "dispatcher", "up"])
def test_commands__any_other_address_ends_the_process(command: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "CIM_HOST": "0.0.0.0",
        "CIM_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/cim.db",
        "CIM_STORE_URL": str(tmp_path),
        "CIM_RAY_URL": "http://127.0.0.1:1",
        "CIM_PUBLIC_URL": "http://127.0.0.1:1",
        "CIM_SECRET": "s" * 32,
    }
    arguments = ["--data-dir", str(tmp_path / "data")] if command == "up" else []
    done = subprocess.run(
        [sys.executable, "-m", "service", command, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "CIM_HOST: must be 127.0.0.1, ::1 or localhost, got '0.0.0.0'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_children__of_embedded_mode_are_told_to_stay_on_loopback(tmp_path: Path) -> None:
    head = RayHead(gcs_port=1, dashboard_port=2, temp_dir=tmp_path, token_path=tmp_path / "token")
    command = head.command(num_cpus=1)
    assert {"--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"} <= set(command)
    assert head.env({})["RAY_AUTH_MODE"] == "token"
    assert "--host=127.0.0.1" in MlflowServer(port=3, folder=tmp_path).command()
