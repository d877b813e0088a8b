import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contracts.log_names import LogName

SOURCES = st.from_regex(r"[a-z0-9_-]+", fullmatch=True)


@given(source=SOURCES, first=st.integers(0, 10**8), more=st.integers(0, 10**8))
def test_names__are_read_back_as_they_were_given(source: str, first: int, more: int) -> None:
    name = LogName(source=source, first=first, last=first + more)
    assert LogName.parse(str(name)) == name
    assert name.joins == (more > 0)


def test_names__as_they_lie_in_stores_of_earlier_releases() -> None:
    assert str(LogName(source="rank-0", first=7, last=7)) == "rank-0-000007.jsonl"
    assert str(LogName(source="rank-0", first=0, last=63)) == "rank-0-000000_000063.jsonl"


@pytest.mark.parametrize(
    "name",
    [
        "rank-0-7.jsonl",
        "rank-0-0000007.jsonl",
        "rank-0-000007.json",
        "rank-0-000007_000007.jsonl",
        "rank-0-000008_000007.jsonl",
        "rank-0-\u0661\u0661\u0661\u0661\u0661\u0661.jsonl",
        "a/rank-0-000007.jsonl",
        "000007.jsonl",
        "",
    ],
)
def test_parse__takes_no_other_spelling(name: str) -> None:
    assert LogName.parse(name) is None
