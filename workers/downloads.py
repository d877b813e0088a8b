"""Files from http(s) addresses: in pieces, tried again, gone on where a connection broke, checked."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from cim_core.errors import DataError

log = logging.getLogger(__name__)

PROGRESS_BYTES = 1 << 20
MAX_BYTES = 4 << 30
TRIES = 7  # in a row, without that many bytes of progress
LONGEST_PAUSE_S = 30.0
TIMEOUT = httpx.Timeout(60.0, connect=15.0)
AGAIN = frozenset({408, 425, 429})  # besides 5xx: the server says "later", not "no"
COMPLETE, PARTIAL, BAD_RANGE = 200, 206, 416

OnBytes = Callable[[int, int | None], None]  # (bytes here, bytes in all where known)
MayFetch = Callable[[str], None]  # raises for an address that must not be asked


class SourceAwayError(Exception):
    """An address did not give its file for all tries; later it may."""


class _BrokenOffError(Exception):
    """One try ended early; what came is kept."""


@dataclass
class _Part:
    """A file that is being fetched, as far as the server's answers tell."""

    path: Path
    total: int | None = None
    validator: str | None = None  # of the version that the bytes here belong to

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def restart(self) -> None:
        self.path.write_bytes(b"")
        self.total = self.validator = None


def download(
    address: str, target: Path, *, on_bytes: OnBytes, may_fetch: MayFetch, pause_s: float = 1.0
) -> None:
    """Fetch `address` into `target`, which appears when it is whole.

    `on_bytes` is called between pieces, `may_fetch` before each request, those that a server sends us on to
    as well; both may raise to end the download.

    Raises:
        DataError: the server says that there is no such file for us, or the file is too large.
        SourceAwayError: the server stayed away, or kept breaking off, for all tries.
    """
    part = _Part(target.with_name(target.name + ".part"))
    target.parent.mkdir(parents=True, exist_ok=True)
    part.restart()
    turn = 0
    hooks = {"request": [lambda request: may_fetch(str(request.url))]}
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, event_hooks=hooks) as client:
        while True:
            before = part.size
            try:
                _continue(client, address, part, on_bytes)
                break
            except (httpx.InvalidURL, httpx.TooManyRedirects, httpx.UnsupportedProtocol) as error:
                raise DataError(f"{shown(address)} cannot be fetched: {error}") from error
            except (httpx.TransportError, _BrokenOffError) as error:
                turn = 1 if part.size >= before + PROGRESS_BYTES else turn + 1
                _wait(address, error, turn=turn, size=part.size, pause_s=pause_s)
    part.path.replace(target)


def shown(address: str) -> str:
    """An address without what may be secret in it: password and query."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _wait(address: str, error: Exception, *, turn: int, size: int, pause_s: float) -> None:
    told = str(error) or type(error).__name__
    if turn >= TRIES:
        raise SourceAwayError(
            f"{shown(address)} could not be fetched in {TRIES} tries, the last one ended with: {told}. Can "
            "the workers reach it? A path or an s3:// address that they can read does as well"
        ) from error
    log.warning("%s broke off after %d bytes, trying again: %s", shown(address), size, told)
    time.sleep(min(LONGEST_PAUSE_S, pause_s * 2 ** (turn - 1)))


def _continue(client: httpx.Client, address: str, part: _Part, on_bytes: OnBytes) -> None:
    """One try, from where the last one ended if the server can."""
    with client.stream("GET", address, headers=_headers(part)) as answer:
        _check_status(address, answer)
        if not _goes_on(answer, part):
            part.restart()
            if answer.status_code != COMPLETE:
                raise _BrokenOffError("the server gave another range than was asked for")
        part.total = part.total or _total_of(answer)
        part.validator = _validator_of(answer)
        _append(answer, part, on_bytes, address=address)
    if part.total is not None and part.size != part.total:
        raise _BrokenOffError(f"{part.size} of {part.total} bytes came")


def _headers(part: _Part) -> dict[str, str]:
    # Compressed on the way, neither length nor range would be the file's.
    headers = {"Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if part.validator is not None:
            headers["If-Range"] = part.validator
    return headers


def _check_status(address: str, answer: httpx.Response) -> None:
    status = answer.status_code
    if status in (COMPLETE, PARTIAL, BAD_RANGE):
        return
    if status >= 500 or status in AGAIN:
        raise _BrokenOffError(f"HTTP {status} {answer.reason_phrase}")
    raise DataError(
        f"{shown(address)} gives no file but HTTP {status} {answer.reason_phrase}: check the address, or "
        "give another one, a path or an s3:// address"
    )


def _goes_on(answer: httpx.Response, part: _Part) -> bool:
    """Whether the answer's bytes follow those that are here, of the same version of the file."""
    if answer.status_code != PARTIAL:
        return False
    unit, _, place = answer.headers.get("Content-Range", "").partition(" ")
    span, _, total = place.partition("/")
    same = not (total.isdecimal() and part.total) or int(total) == part.total
    return unit == "bytes" and span.partition("-")[0] == str(part.size) and same


def _total_of(answer: httpx.Response) -> int | None:
    length = answer.headers.get("Content-Length", "")
    if answer.status_code == PARTIAL:
        length = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdecimal() else None


def _validator_of(answer: httpx.Response) -> str | None:
    tag: str | None = answer.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    date: str | None = answer.headers.get("Last-Modified")
    return date


def _append(answer: httpx.Response, part: _Part, on_bytes: OnBytes, *, address: str) -> None:
    size = part.size
    with part.path.open("ab") as file:
        # No size is given: httpx would hold back, and lose at a break, what does not fill a piece.
        for chunk in answer.iter_raw():
            size += len(chunk)
            if max(size, part.total or 0) > MAX_BYTES:
                raise DataError(
                    f"{shown(address)} is larger than {MAX_BYTES} bytes: it is not the file that is meant"
                )
            file.write(chunk)
            on_bytes(size, part.total)
