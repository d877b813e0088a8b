"""What cannot be read: what its user can mend is a DataError, what may pass by itself stays an OSError."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cim_core.errors import DataError

# Another attempt would meet these again; a disk or a network that fails may be back by then.
LASTING = frozenset(
    {
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
    }
)
_MOST_SHOWN = 300  # characters of a path


@contextmanager
def mendable(told: str, *, remedy: str) -> Iterator[None]:
    """Raise a DataError "`told` cannot be read: why; `remedy`" for a lasting OSError inside."""
    try:
        yield
    except OSError as error:
        if error.errno not in LASTING:
            raise
        raise DataError(f"{told} cannot be read: {why(error)}; {remedy}") from error


def why(error: OSError) -> str:
    """The reason without the path, which is told beside it."""
    return error.strerror or str(error) or type(error).__name__


def shortened(path: str | Path) -> str:
    """A path that may be longer than any message: its beginning and its end."""
    text = str(path)
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} ... {text[-half:]}"
