"""The token by which a worker proves that it belongs to an attempt. Nothing of it is stored."""

import hashlib
import hmac


def attempt_token(secret: str, job_id: str, attempt: int) -> str:
    """HMAC-SHA256 of the attempt under the service's secret, as 64 hex digits."""
    message = f"cim attempt {job_id}/{attempt}".encode()
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


def token_fits(token: str, *, secret: str, job_id: str, attempt: int) -> bool:
    """Whether `token` belongs to the attempt; takes the same time for every wrong one."""
    expected = attempt_token(secret, job_id, attempt)
    return hmac.compare_digest(token.encode(), expected.encode())
