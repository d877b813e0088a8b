"""Everything outside the database that a job owns is named by a function of (job, attempt).

That makes each outside action safe to repeat: the second try finds what the first one made.
"""

import secrets

JOB_ID_LENGTH = 16
ATTEMPTS = "attempts"  # below a job's prefix: what belongs to one attempt alone
SHARED = "tokenizers"  # what jobs share; workers write there too


def new_job_id() -> str:
    """Sixteen random hex digits."""
    return secrets.token_hex(JOB_ID_LENGTH // 2)


def submission_id(job_id: str, attempt: int) -> str:
    """The id of the attempt's Ray job; Ray refuses a second one of the same id."""
    return f"cim-{job_id}-{attempt}"


def run_name(job_id: str, attempt: int) -> str:
    """The name of the attempt's Ray Train run."""
    return f"cim-{job_id}-{attempt}"


def job_prefix(job_id: str) -> str:
    """Where the job's artifacts lie in the object store."""
    return f"jobs/{job_id}"


def attempt_prefix(attempt: int) -> str:
    """Where one attempt's checkpoints lie, below the job's prefix."""
    return f"{ATTEMPTS}/{attempt}"


def checkpoint_prefix(attempt: int, step: int) -> str:
    """Where one checkpoint lies, below the job's prefix."""
    return f"{attempt_prefix(attempt)}/checkpoints/step-{step}"


def log_prefix(job_id: str, attempt: int | None = None) -> str:
    """Where the logs of a job, or of one attempt, lie in the object store; ends with a slash."""
    logs = f"{job_prefix(job_id)}/logs/"
    return logs if attempt is None else f"{logs}attempt-{attempt}/"
