"""The `Range` header of RFC 9110, as far as downloads that are resumed need it."""

import re

from starlette.exceptions import HTTPException

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def wanted(header: str | None, *, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last; None where the whole file is meant.

    Raises HTTPException 416 for a range that lies outside. Several ranges at once, and units other
    than bytes, are answered with the whole file, which the standard allows.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if last and first and int(last) < int(first):
        return None
    if start >= size:
        raise HTTPException(
            416, detail=f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end
