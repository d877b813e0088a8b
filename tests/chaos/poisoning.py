"""Rows at the head of the queue that make no sense, and a healthy job behind them."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy.dialects import postgresql

from service.client.errors import ApiError
from service.db.tables import Base
from service.domain.names import submission_id
from tests.chaos.load import ATTEMPTS, training
from tests.chaos.stack import Stack
from tests.fakes import poison

# Constraints of the database keep any nonsense out of these.
_SOUND = {"id", "job_id", "state", "desired", "failure_kind"}
COLUMNS = [
    column
    for column in poison.COLUMNS
    if column.startswith(("jobs.", "attempts.")) and column.rpartition(".")[2] not in _SOUND
]
# Not launching, or those that turn out to be sound would be submitted to the cluster.
_STATES = ("queued", "running", "stopping", "retrying")
# Should a row turn out to be a sound job after all, it stays one that no cluster could hold.
_IMPOSSIBLE = {"workers": 1024, "cpus_per_worker": 256, "gpus_per_worker": 1}
_URGENT = 100
_COPY = "INSERT INTO jobs SELECT (jsonb_populate_record(j, %s)).* FROM jobs j WHERE j.id = %s"
_ATTEMPT = "INSERT INTO attempts (job_id, number, submission_id, started_at) VALUES (%s, 1, %s, now())"


@dataclass(kw_only=True)
class PoisonRows:
    """A job for each column, with poison in it; over as soon as a healthy one behind them is launched."""

    hold_s: float = 55.0
    planted: list[str] = field(default_factory=list)
    healthy: str = ""
    began: float = 0.0

    def inject(self, stack: Stack, random: Random) -> None:
        """Copies of some job, all of them before everybody else's in the queue."""
        with psycopg.connect(stack.postgres.uri, autocommit=True) as connection:
            ids = [row[0] for row in connection.execute("SELECT id FROM jobs ORDER BY id")]
            for column in COLUMNS if ids else ():
                self._plant(connection, column, template=random.choice(ids), random=random)
        self.began = time.monotonic()
        self.healthy = self._submit(stack, random)

    def over(self, stack: Stack) -> bool:
        """Whether the healthy job has been launched."""
        return bool(self.healthy) and self._seen(stack)[0] > 0

    def heal(self, stack: Stack) -> None:
        """Remove the rows, and note whether anybody had to wait for that."""
        if self.healthy:
            attempt, reason = self._seen(stack)
            facts = {"launched": attempt > 0, "waited_s": time.monotonic() - self.began, "reason": reason}
            stack.journal.note("poisoned", job=self.healthy, **facts)
        with psycopg.connect(stack.postgres.uri, autocommit=True) as connection:
            connection.execute("DELETE FROM jobs WHERE id = ANY(%s)", (self.planted,))

    def _plant(
        self,
        connection: "psycopg.Connection[tuple[object, ...]]",
        column: str,
        *,
        template: object,
        random: Random,
    ) -> None:
        job_id = f"{random.getrandbits(64):016x}"
        changes = {
            "id": job_id,
            "state": random.choice(_STATES),
            "desired": "run",
            "priority": _URGENT,
            "attempt": 1,
            "mlflow_run_id": None,
            "mlflow_closed": False,
            "resolved": {"resources": _IMPOSSIBLE},
        }
        connection.execute(_COPY, (Jsonb(changes), template))
        self.planted.append(job_id)
        connection.execute(_ATTEMPT, (job_id, submission_id(job_id, 1)))
        table, _, name = column.partition(".")
        kind = Base.metadata.tables[table].columns[name].type.compile(postgresql.dialect())  # type: ignore[no-untyped-call]
        value = random.choice(poison.values(column, "postgresql"))
        whose = "id" if table == "jobs" else "job_id"
        update = f"UPDATE {table} SET {name} = CAST(%s AS {kind}) WHERE {whose} = %s"
        with suppress(psycopg.IntegrityError):  # a unique one that is taken
            connection.execute(update, (value, job_id))

    def _submit(self, stack: Stack, random: Random) -> str:
        """A job that is as urgent, and younger."""
        name = f"healthy-{random.getrandbits(32):08x}"
        spec = {
            "kind": "tokenizer",
            "name": name,
            "data": {"uri": "s3://photos/all/"},
            "training": training(random),
            "retries": {"max_attempts": ATTEMPTS},
            "priority": _URGENT,
        }
        asked = time.monotonic()
        try:
            (job,) = stack.client().submit([spec], idempotency_key=name)
        except ApiError:
            return ""
        facts = {"key": name, "names": [name], "priorities": [_URGENT]}
        stack.journal.note("call", op="submit", asked=asked, jobs=[job.id], states=[job.state], **facts)
        return job.id

    def _seen(self, stack: Stack) -> tuple[int, str]:
        """The healthy job's latest attempt and its reason."""
        with psycopg.connect(stack.postgres.uri) as connection:
            query = "SELECT attempt, reason FROM jobs WHERE id = %s"
            row = connection.execute(query, (self.healthy,)).fetchone()
        assert row is not None
        return int(row[0]), str(row[1])
