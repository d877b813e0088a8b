"""The client that times submissions: what it calls a percentile, and when a request's time begins."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.client import Latencies, post_steadily

HELD_S = 0.4


@given(
    seconds=st.lists(st.floats(0, 100), min_size=1, max_size=300),
    share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_at__is_the_nearest_rank(seconds: list[float], share: float) -> None:
    found = Latencies(seconds=tuple(seconds), num_failed=0).at(share)
    assert found == np.percentile(seconds, 100 * share, method="inverted_cdf")


@pytest.mark.parametrize("status", [b"201 Created", b"503 Service Unavailable"])
async def test_requests__that_wait_behind_a_slow_one_are_timed_from_when_they_were_due(status: bytes) -> None:
    first: list[float] = []
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(2)
            first.append(loop.time())
            await asyncio.sleep(first[0] + HELD_S - loop.time())  # nobody is answered before then
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/things"
    found = await post_steadily(url, [{}] * 20, rate=100)
    server.close()
    if status.startswith(b"503"):
        assert found == Latencies(seconds=(), num_failed=20)
    else:
        assert found.num_failed == 0
        # Request n was due n / 100 s after the first.
        assert all(one >= HELD_S - n / 100 for n, one in enumerate(sorted(found.seconds, reverse=True)))
