import os

import pytest

from service.contracts.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("a café 写真 \U0001f600.jpg\n", "a café 写真 \U0001f600.jpg\n"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\udce9.jpg"),
        ("\ud83d alone", r"\ud83d alone"),
        ("a\0b", "a\ufffdb"),
    ],
)
def test_printable__is_utf8_and_tells_such_names_apart(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
