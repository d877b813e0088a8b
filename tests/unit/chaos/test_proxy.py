"""Each way in which the campaign's relay misbehaves, on a real server behind it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.chaos.proxy import Answer, Delay, Freeze, LoseReplies, Mode, Network, Pass, Proxy, Refuse, Trip

SOON, LONG = 0.3, 20.0


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, and remembers it."""

    protocol_version = "HTTP/1.1"
    seen: list[bytes]

    def do_POST(self) -> None:
        self._echo()

    def do_PUT(self) -> None:
        self._echo()

    def _echo(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:  # else the client would send its next request into the closing one
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def seen() -> list[bytes]:
    return []


@pytest.fixture
def server(seen: list[bytes]) -> Iterator[int]:
    handler = type("Handler", (Echo,), {"seen": seen})
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made.server_address[1]
    made.shutdown()
    made.server_close()


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


@pytest.fixture
def proxy(network: Network, server: int) -> Proxy:
    return network.proxy("echo", [("127.0.0.1", server)])


@pytest.fixture
def http(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", trust_env=False, timeout=LONG) as made:
        yield made


def test_pass__carries_both_ways_over_one_connection(http: httpx.Client) -> None:
    body = b"x" * 300_000
    assert http.post("/", content=body).content == body
    assert http.post("/", content=b"again").content == b"again"


def test_refuse__cuts_and_listens_again_on_the_same_port(
    network: Network, proxy: Proxy, http: httpx.Client
) -> None:
    http.post("/", content=b"1")
    network.apply(proxy, Refuse())
    for _ in range(2):
        with pytest.raises(httpx.TransportError):
            http.post("/", content=b"2")
    network.apply(proxy, Pass())
    assert http.post("/", content=b"3").content == b"3"


@pytest.mark.parametrize("used", [True, False], ids=["open connection", "new connection"])
def test_freeze__nothing_moves_until_it_thaws(
    network: Network, proxy: Proxy, http: httpx.Client, seen: list[bytes], *, used: bool
) -> None:
    if used:
        http.post("/", content=b"0")
    network.apply(proxy, Freeze())
    with pytest.raises(httpx.ReadTimeout):
        http.post("/", content=b"1", timeout=SOON)
    assert b"1" not in seen
    network.apply(proxy, Pass())
    assert http.post("/", content=b"2").content == b"2"


@pytest.mark.parametrize("mode", [LoseReplies(share=1.0), Delay(seconds=SOON)], ids=["lose", "delay"])
def test_modes__the_server_has_done_what_was_asked(
    network: Network, proxy: Proxy, http: httpx.Client, seen: list[bytes], mode: Mode
) -> None:
    network.apply(proxy, mode)
    if isinstance(mode, LoseReplies):
        with pytest.raises(httpx.TransportError):
            http.post("/", content=b"1")
    else:
        assert http.post("/", content=b"1").elapsed.total_seconds() >= 2 * SOON
    assert seen == [b"1"]


def test_answer__takes_the_place_of_the_server_for_its_methods(
    network: Network, proxy: Proxy, http: httpx.Client, seen: list[bytes]
) -> None:
    http.post("/", content=b"0")
    network.apply(proxy, Answer(status="507 Insufficient Storage", body=b"full", methods=(b"PUT",)))
    refused = http.put("/", content=b"1")
    assert (refused.status_code, refused.content) == (507, b"full")
    assert http.post("/", content=b"2").content == b"2"
    assert http.put("/", content=b"3").status_code == 507
    assert seen == [b"0", b"2"]


@pytest.mark.parametrize("after", [True, False])
def test_trip__springs_once_before_or_after_the_server(
    network: Network, proxy: Proxy, http: httpx.Client, seen: list[bytes], *, after: bool
) -> None:
    sprung: list[int] = []
    network.apply(proxy, Trip(pattern=b"POST /trap ", after=after, action=lambda: sprung.append(len(seen))))
    assert http.post("/", content=b"0").content == b"0"
    assert not proxy.tripped.is_set()
    with pytest.raises(httpx.TransportError):
        http.post("/trap", content=b"1")
    assert proxy.tripped.wait(LONG)
    assert sprung == ([2] if after else [1])
    assert http.post("/trap", content=b"2").content == b"2"
    assert len(sprung) == 1


def test_targets__one_that_is_gone_is_passed_over(network: Network, server: int) -> None:
    both = network.proxy("both", [("127.0.0.1", 1), ("127.0.0.1", server)])
    for _ in range(4):
        url = f"http://127.0.0.1:{both.port}/"
        assert httpx.post(url, content=b"x", trust_env=False, timeout=LONG).content == b"x"
