"""Attempt tokens against an HMAC written out by hand."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from service.contracts.tokens import attempt_token, token_fits

BLOCK = 64  # bytes of a SHA-256 block


def by_hand(secret: str, message: bytes) -> str:
    """RFC 2104, for keys of at most one block."""
    key = secret.encode().ljust(BLOCK, b"\x00")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in key) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in key) + inner).hexdigest()


def test_attempt_token__is_the_hmac_of_job_and_attempt() -> None:
    assert attempt_token("secret", "0123456789abcdef", 3) == by_hand(
        "secret", b"cim attempt 0123456789abcdef/3"
    )


@given(first=st.integers(1, 99), second=st.integers(1, 99))
def test_token_fits__one_attempt_only(first: int, second: int) -> None:
    token = attempt_token("secret", "a" * 16, first)
    assert token_fits(token, secret="secret", job_id="a" * 16, attempt=second) == (first == second)
    assert not token_fits(token, secret="other", job_id="a" * 16, attempt=first)
    assert not token_fits(token, secret="secret", job_id="b" * 16, attempt=first)


def test_token_fits__other_characters_are_simply_wrong() -> None:
    assert not token_fits("é", secret="secret", job_id="a" * 16, attempt=1)
