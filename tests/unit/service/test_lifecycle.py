"""Properties that the table of moves must have, and the page drawn from it."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.draw_lifecycle import PAGE, redrawn
from service.contracts.jobs import FINAL
from service.contracts.jobs import JobState as S
from service.domain.lifecycle import HOLDS_WORKERS, MOVES, check
from service.errors import IllegalMoveError

states = st.sampled_from(sorted(S))


def reachable(start: S) -> set[S]:
    seen, todo = {start}, [start]
    while todo:
        new = set(MOVES[todo.pop()]) - seen
        seen |= new
        todo += new
    return seen


def test_table__knows_every_state() -> None:
    assert set(MOVES) == set(S)


@pytest.mark.parametrize("state", sorted(set(S) - FINAL))
def test_table__every_live_job_can_end_well_badly_or_by_request(state: S) -> None:
    assert reachable(state) >= FINAL


@given(src=states, dst=states)
def test_check__agrees_with_the_table(src: S, dst: S) -> None:
    if dst in MOVES[src]:
        check(src, dst, by_user=True)
    else:
        with pytest.raises(IllegalMoveError, match=rf"a {src} job cannot become {dst}"):
            check(src, dst, by_user=True)


@given(src=states, dst=states)
def test_check__what_is_final_is_so_for_all_but_its_user(src: S, dst: S) -> None:
    if src not in FINAL and dst in MOVES[src]:
        check(src, dst)
    else:
        with pytest.raises(IllegalMoveError, match=rf"a {src} job cannot become {dst}"):
            check(src, dst)


@given(walk=st.lists(states, max_size=20))
def test_walk__no_legal_walk_leaves_a_success_or_starts_workers_unseen(walk: list[S]) -> None:
    at = S.QUEUED
    for dst in walk:
        if dst not in MOVES[at]:
            continue
        assert at not in FINAL or (at is not S.SUCCEEDED and dst is S.QUEUED)
        if dst in HOLDS_WORKERS and at not in HOLDS_WORKERS:
            assert dst is S.LAUNCHING  # where the fence is raised
        at = dst


def test_check__a_stopping_job_never_runs_again() -> None:
    with pytest.raises(IllegalMoveError, match="it can become: cancelled, failed, paused, succeeded"):
        check(S.STOPPING, S.RUNNING)


def test_page__is_drawn_from_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == redrawn(page), "run `python -m scripts.draw_lifecycle`"


def test_state__is_written_by_moves_alone() -> None:
    service = Path(__file__).parents[3] / "service"
    writes = re.compile(
        r"\.state = |[\"']state[\"']\s*:\s*(S|JobState)\.|values\([^)]*\bstate=|(?<!class )JobRow\("
    )
    writers = {
        path.relative_to(service).as_posix()
        for path in service.rglob("*.py")
        if writes.search(path.read_text(encoding="utf-8"))
    }
    assert writers == {"db/moves.py"}
