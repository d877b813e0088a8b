"""Claim codes against an HMAC written out by hand, and the tokens that they are given up for."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from service.contracts.tokens import claim_code, code_fits, digest_of, new_token, token_fits

BLOCK = 64  # bytes of a SHA-256 block


def by_hand(secret: str, message: bytes) -> str:
    """RFC 2104, for keys of at most one block."""
    key = secret.encode().ljust(BLOCK, b"\x00")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in key) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in key) + inner).hexdigest()


def test_claim_code__is_the_hmac_of_job_and_attempt() -> None:
    assert claim_code("secret", "0123456789abcdef", 3) == by_hand("secret", b"cim claim 0123456789abcdef/3")


@given(first=st.integers(1, 99), second=st.integers(1, 99))
def test_code_fits__one_attempt_only(first: int, second: int) -> None:
    code = claim_code("secret", "a" * 16, first)
    assert code_fits(code, secret="secret", job_id="a" * 16, attempt=second) == (first == second)
    assert not code_fits(code, secret="other", job_id="a" * 16, attempt=first)
    assert not code_fits(code, secret="secret", job_id="b" * 16, attempt=first)


def test_fits__other_characters_are_simply_wrong() -> None:
    assert not code_fits("é", secret="secret", job_id="a" * 16, attempt=1)
    assert not token_fits("é", digest=digest_of("e"))


def test_new_token__is_another_one_each_time_and_fits_its_own_digest_alone() -> None:
    first, second = new_token(), new_token()
    assert token_fits(first, digest=digest_of(first))
    assert not token_fits(second, digest=digest_of(first))
    # The digest, which the database holds, opens nothing.
    assert not token_fits(digest_of(first), digest=digest_of(first))
