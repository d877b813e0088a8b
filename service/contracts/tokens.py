"""How a worker proves that it belongs to an attempt.

What is submitted to Ray stands on Ray's pages for everybody. So it holds no more than a code that is
good for one thing: to claim the attempt, once, for a token that the worker has made by itself. The
service keeps the token's digest, and from then on nothing but that token speaks for the attempt.
"""

import hashlib
import hmac
import secrets

_TOKEN_BYTES = 32


def claim_code(secret: str, job_id: str, attempt: int) -> str:
    """HMAC-SHA256 of the attempt under the service's secret, as 64 hex digits. Nothing of it is stored."""
    message = f"cim claim {job_id}/{attempt}".encode()
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


def code_fits(code: str, *, secret: str, job_id: str, attempt: int) -> bool:
    """Whether `code` belongs to the attempt; takes the same time for every wrong one."""
    expected = claim_code(secret, job_id, attempt)
    return hmac.compare_digest(code.encode(), expected.encode())


def new_token() -> str:
    """A token that nobody else has."""
    return secrets.token_hex(_TOKEN_BYTES)


def digest_of(token: str) -> str:
    """What is stored of a token: it has 256 random bits, so a plain SHA-256 cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_fits(token: str, *, digest: str) -> bool:
    """Whether `digest` was made of `token`; takes the same time for every wrong one."""
    return hmac.compare_digest(digest_of(token), digest)
