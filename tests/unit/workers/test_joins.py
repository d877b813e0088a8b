"""What is joined is what was sent, line for line, whatever fails or dies in between."""

import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contracts.log_names import LogName
from workers.joins import JOIN_BYTES, JOIN_PIECES, Joins
from workers.logs import LogShipper
from workers.spool import recover


class Shelf(dict[str, bytes]):
    """Objects by key; refuses joins while `refuses`, dies at one while `kills`."""

    refuses = kills = rewritten = False

    def put_bytes(self, key: str, data: bytes) -> None:
        self.rewritten |= key in self
        joins = "_" in key
        if joins and self.kills:
            raise KeyboardInterrupt
        if joins and self.refuses:
            raise OSError("refused")
        self[key] = data

    def joins(self) -> dict[tuple[int, int], bytes]:
        """The objects that stand for several pieces."""
        names = {name: LogName.parse(name.rpartition("/")[2]) for name in self}
        return {(name.first, name.last): self[key] for key, name in names.items() if name and name.joins}

    def pieces(self) -> list[bytes]:
        """The others, by number."""
        return [self[key] for key in sorted(self) if "_" not in key]


def shipper(shelf: Shelf, folder: Path) -> LogShipper:
    return LogShipper(
        shelf,
        "logs/attempt-1",
        spool=folder / "attempt-1",
        attempt=1,
        source="rank-0",
        lines_per_minute=10**6,
    )


def ship(made: LogShipper, *texts: str) -> None:
    """A piece for each text."""
    for text in texts:
        made.handle(logging.LogRecord("workers", logging.INFO, "", 0, text, None, None))
        assert made.ship()


def texts(first: int, number: int) -> list[str]:
    return [f"line {n}" for n in range(first, first + number)]


def test_ship__every_64_pieces_are_stored_once_more_as_one(tmp_path: Path) -> None:
    shelf = Shelf()
    made = shipper(shelf, tmp_path)
    ship(made, *texts(0, 2 * JOIN_PIECES + 2))
    pieces = shelf.pieces()
    assert shelf.joins() == {
        (0, 63): b"".join(pieces[:64]),
        (64, 127): b"".join(pieces[64:128]),
    }
    made.close()
    assert shelf.joins()[128, 129] == b"".join(pieces[128:])
    assert len(shelf) == 130 + 3


def test_ship__a_single_piece_is_not_stored_twice(tmp_path: Path) -> None:
    shelf = Shelf()
    made = shipper(shelf, tmp_path)
    ship(made, "only")
    made.close()
    assert list(shelf) == ["logs/attempt-1/rank-0-000000.jsonl"]
    assert not shelf.rewritten


def test_ship__a_join_that_is_refused_costs_no_line_and_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf()
    shelf.refuses = True
    made = shipper(shelf, tmp_path)
    ship(made, *texts(0, JOIN_PIECES))
    assert "64 pieces of log stay apart, the object store refused" in capsys.readouterr().err
    shelf.refuses = False
    ship(made, *texts(0, JOIN_PIECES))
    assert list(shelf.joins()) == [(64, 127)]
    assert len(shelf.pieces()) == 128


def test_killed__between_the_last_piece_and_its_join_nothing_is_lost(tmp_path: Path) -> None:
    shelf = Shelf()
    made = shipper(shelf, tmp_path)
    shelf.kills = True
    with pytest.raises(KeyboardInterrupt):
        ship(made, *texts(0, JOIN_PIECES))
    made.handle(logging.LogRecord("workers", logging.INFO, "", 0, "last words", None, None))
    made._spool.close()  # as the system does with the lock of a dead process
    shelf.kills = False
    assert recover(tmp_path, shelf, "logs") == 1
    assert (len(shelf.pieces()), shelf.joins()) == (65, {})
    assert b"last words" in shelf.pieces()[-1]
    successor = shipper(shelf, tmp_path)
    ship(successor, *texts(0, 2))
    successor.close()
    assert shelf.joins() == {(65, 66): b"".join(shelf.pieces()[65:])}


PIECES = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from(
            [b"", b"a\n", b"cut", b"b\n" * 9, b"c" * (JOIN_BYTES // 3) + b"\n", b"d" * JOIN_BYTES + b"\n"]
        ),
    ),
    max_size=200,
)


@given(told=PIECES)
def test_joins__hold_what_was_added_in_whole_lines_and_never_more_than_they_may(
    told: list[tuple[bool, bytes]],
) -> None:
    shelf, numbered, number = Shelf(), dict[int, bytes](), 0
    joins = Joins(shelf, "logs")
    for hole, data in told:
        number += 1 + hole
        numbered[number] = data
        joins.add(f"rank-0-{number:06d}.jsonl", data)
        assert joins.size <= JOIN_BYTES + 1
    joins.store_rest()
    covered: list[int] = []
    for (first, last), data in shelf.joins().items():
        assert last - first < JOIN_PIECES
        assert len(data) <= JOIN_BYTES + JOIN_PIECES
        covered += range(first, last + 1)
        assert data.split(b"\n") == _lines(numbered[n] for n in range(first, last + 1))
    assert len(set(covered)) == len(covered)
    assert set(covered) <= set(numbered)  # no hole


def test_joins__a_piece_too_large_to_keep_stays_apart() -> None:
    shelf = Shelf()
    joins = Joins(shelf, "logs")
    sizes = [1, 1, JOIN_BYTES + 1, 1, 1, JOIN_BYTES - 2, 1]
    for number, size in enumerate(sizes):
        joins.add(f"driver-{number:06d}.jsonl", b"\n" * size)
        assert joins.size <= JOIN_BYTES
    joins.store_rest()
    assert list(shelf.joins()) == [(0, 1), (3, 5)]


def _lines(pieces: Iterable[bytes]) -> list[bytes]:
    whole = (data if data.endswith(b"\n") or not data else data + b"\n" for data in pieces)
    return b"".join(whole).split(b"\n")
