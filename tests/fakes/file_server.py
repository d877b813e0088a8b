"""An HTTP server with one file at every path, and whatever goes wrong on the way to it."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["FileServer", BaseHTTPRequestHandler], None]


@dataclass
class FileServer:
    """Answers with `answers` in their order, then as a good server would; notes every request."""

    files: dict[str, bytes]  # by path, e.g. /encoder.pkl
    answers: list[Answer] = field(default_factory=list)
    tag: str | None = '"one"'
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    conditions: list[str | None] = field(default_factory=list)  # If-Range

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append((handler.path, handler.headers["Range"]))
        self.conditions.append(handler.headers["If-Range"])
        (self.answers.pop(0) if self.answers else whole)(self, handler)


def whole(server: FileServer, handler: BaseHTTPRequestHandler) -> None:
    """The file, or the range of it that was asked for, if it is still the same file."""
    send(server, handler)


def dropped_after(num: int) -> Answer:
    """As `whole`, but the connection ends after `num` bytes of the body."""
    return lambda server, handler: send(server, handler, at_most=num)


def without_ranges(server: FileServer, handler: BaseHTTPRequestHandler) -> None:
    """The file from its first byte, whatever was asked for."""
    send(server, handler, ranges=False)


def status(code: int) -> Answer:
    """That status and no file."""

    def answer(_: FileServer, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def headers(code: int, body: bytes = b"", **given: str) -> Answer:
    """That status with these headers (`_` for `-`) and this body."""

    def answer(_: FileServer, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def send(
    server: FileServer, handler: BaseHTTPRequestHandler, *, at_most: int | None = None, ranges: bool = True
) -> None:
    content = server.files[handler.path]
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
    same = handler.headers["If-Range"] in (None, server.tag)
    first = int(asked[1]) if asked and ranges and same else 0
    handler.send_response(206 if first else 200)
    if first:
        handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
    if server.tag is not None:
        handler.send_header("ETag", server.tag)
    handler.send_header("Content-Length", str(len(content) - first))
    handler.end_headers()
    handler.wfile.write(content[first:][:at_most])


@contextmanager
def serving_files(files: dict[str, bytes]) -> Iterator[FileServer]:
    """A server on a free port of this machine."""
    state = FileServer(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.answer(self)

        def end_headers(self) -> None:
            self.send_header("Connection", "close")  # which also ends the connection behind the answer
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
