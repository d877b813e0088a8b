"""The life of a job: every legal move, in one table. `docs/lifecycle.md` is drawn from it.

What the user wants (run, pause, cancel) is a column of its own. A job that holds no workers is
cancelled at once; one that does is `stopping` until the workers are known to be gone. A final
state stays, unless the user himself asks for another try of a job that did not succeed.
"""

from collections.abc import Mapping
from types import MappingProxyType

from service.contracts.jobs import FINAL
from service.contracts.jobs import JobState as S
from service.errors import IllegalMoveError

MOVES: Mapping[S, frozenset[S]] = MappingProxyType(
    {
        S.QUEUED: frozenset({S.LAUNCHING, S.PAUSED, S.FAILED, S.CANCELLED}),
        S.LAUNCHING: frozenset({S.RUNNING, S.STOPPING, S.RETRYING, S.SUCCEEDED, S.FAILED}),
        S.RUNNING: frozenset({S.STOPPING, S.RETRYING, S.SUCCEEDED, S.FAILED}),
        # The attempt may end by itself before the stop reaches it.
        S.STOPPING: frozenset({S.PAUSED, S.CANCELLED, S.SUCCEEDED, S.FAILED}),
        S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
        S.RETRYING: frozenset({S.LAUNCHING, S.PAUSED, S.FAILED, S.CANCELLED}),
        S.SUCCEEDED: frozenset(),
        S.FAILED: frozenset({S.QUEUED}),
        S.CANCELLED: frozenset({S.QUEUED}),
    }
)

HOLDS_WORKERS = frozenset({S.LAUNCHING, S.RUNNING, S.STOPPING})


def check(src: S, dst: S, *, by_user: bool = False) -> None:
    """Raise `IllegalMoveError` unless a job in `src` may go to `dst`; a final one only `by_user`."""
    if src in FINAL and not by_user:
        raise IllegalMoveError(f"a {src} job cannot become {dst}: it is final for all but its user")
    if dst not in MOVES[src]:
        allowed = ", ".join(sorted(MOVES[src])) or "nothing, it is final"
        raise IllegalMoveError(f"a {src} job cannot become {dst}; from {src} it can become: {allowed}")


assert all(MOVES[state] <= {S.QUEUED} for state in FINAL)
