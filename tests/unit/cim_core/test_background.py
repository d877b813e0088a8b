"""Work beside the training: its order, its errors, its end."""

import threading
from functools import partial

import pytest

from cim_core.engine.background import Background


@pytest.mark.parametrize("enabled", [True, False])
def test_do__in_order_one_at_a_time(*, enabled: bool) -> None:
    done: list[tuple[int, int]] = []
    background = Background(enabled=enabled)

    def piece(number: int) -> None:
        done.append((number, threading.get_ident()))

    for number in range(5):
        background.do(partial(piece, number))
    background.wait()
    background.close()
    assert [number for number, _ in done] == list(range(5))
    elsewhere = {thread for _, thread in done} != {threading.get_ident()}
    assert elsewhere == enabled


def test_do__returns_while_the_piece_is_under_way() -> None:
    background, gate = Background(), threading.Event()
    background.do(gate.wait)
    background.check()
    gate.set()
    background.wait()
    background.close()


def fail() -> None:
    raise OSError("the disk is full")


def failed() -> Background:
    """A background whose last piece has failed."""
    background = Background()
    background.do(fail)
    background.close()
    return background


@pytest.mark.parametrize("ask", ["check", "wait", "do"])
def test_error__is_raised_at_the_next_question_and_once(ask: str) -> None:
    background = failed()
    later: list[int] = []
    with pytest.raises(OSError, match="the disk is full"):
        background.do(lambda: later.append(1)) if ask == "do" else getattr(background, ask)()
    background.check()
    assert later == [], "what comes after a failed piece is not done"


def test_error__at_once_where_nothing_goes_on_beside() -> None:
    with pytest.raises(OSError, match="the disk is full"):
        Background(enabled=False).do(fail)


def test_close__raises_nothing_and_ends_the_thread() -> None:
    before = threading.active_count()
    failed()
    assert threading.active_count() == before
