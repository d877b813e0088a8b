"""The job machine on SQLite; tests/integration/test_postgres.py runs it on PostgreSQL."""

from pathlib import Path

from tests.fakes.job_machine import run_machine


def test_jobs__agree_with_the_model_whatever_happens(database_url: str, tmp_path: Path) -> None:
    run_machine(database_url, tmp_path, max_examples=25)
