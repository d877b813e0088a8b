"""Slow work beside the training, one piece at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread. What fails in it is raised where the next piece is given, or progress is asked for.

    The pieces are done in the order in which they were given, each only after the one before succeeded.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        """`enabled` False: each piece is done at once, in the caller's thread."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background") if enabled else None
        self._last: Future[object] | None = None

    def do(self, piece: Callable[[], object]) -> None:
        """Start `piece`, after the one before has ended; so at most one holds its memory."""
        self.wait()
        if self._pool is None:
            piece()
        else:
            self._last = self._pool.submit(piece)

    def check(self) -> None:
        """Raise what the last piece raised, if it has ended; never waits."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until the last piece has ended; raises what it raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait and end the thread, but raise nothing: for the way out of an error."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
