"""What is there when the storm is over, read past every proxy."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
from botocore.exceptions import ClientError
from psycopg.rows import dict_row

from service.client import Client
from service.contracts.jobs import LogLine
from service.domain.names import job_prefix
from tests.chaos import curve, history, journal
from tests.chaos.history import Event, File, History, Job, Run
from tests.chaos.stack import BUCKET, Stack

Row = dict[str, Any]
_PREFIX = "artifacts"
_JOB_TAG = "cim.job_id"


def collect(stack: Stack, *, left: Sequence[str]) -> History:
    """The whole history of a campaign that has come to rest."""
    facts = journal.read(stack.journals)
    return History(
        calls=history.calls(facts),
        sightings=history.sightings(facts),
        effects=history.effects(facts),
        poisonings=history.poisonings(facts),
        jobs=_jobs(stack),
        runs=_runs(stack.mlflow_url),
        left=left,
    )


def _jobs(stack: Stack) -> dict[str, Job]:
    with (
        psycopg.connect(stack.postgres.uri, row_factory=dict_row) as connection,
        stack.client() as client,
    ):
        rows, s3 = connection.execute("SELECT * FROM jobs").fetchall(), stack.s3()
        jobs = {row["id"]: _job(connection, client, s3, row) for row in rows}
    spools = stack.journals / journal.SPOOLS
    return {name: replace(job, waiting=_waiting(spools / name)) for name, job in jobs.items()}


def _job(connection: "psycopg.Connection[Row]", client: Client, s3: Any, row: Row) -> Job:
    def all_of(table: str, order: str) -> list[Row]:
        query = f"SELECT * FROM {table} WHERE job_id = %s ORDER BY {order}"
        return connection.execute(query, (row["id"],)).fetchall()

    checkpoints = all_of("checkpoints", "step, attempt")
    training = row["resolved"]["training"]
    return Job(
        id=row["id"],
        name=row["name"],
        state=row["state"],
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        failure_kind=row["failure_kind"],
        reason=row["reason"],
        seed=training["seed"],
        total_steps=training["steps"],
        events=[
            Event(src=e["src"], dst=e["dst"], actor=e["actor"], message=e["message"])
            for e in all_of("events", "id")
        ],
        points=[(point.step, point.value) for point in client.metrics(row["id"], key=curve.LOSS)],
        checkpoints=[(c["attempt"], c["step"]) for c in checkpoints],
        last_checkpoint=_files(s3, row["id"], checkpoints[-1]["files"]) if checkpoints else [],
        files=_files(s3, row["id"], all_of("files", "path")),
        lines=_streams(client.logs(row["id"])),
    )


def _waiting(spools: Path) -> dict[str, list[str]]:
    chunks = sorted(spools.glob("*/*.jsonl"), key=lambda path: (len(path.name), path.name))
    return _streams(
        LogLine.model_validate_json(line) for chunk in chunks for line in chunk.read_text().splitlines()
    )


def _streams(lines: Iterable[LogLine]) -> dict[str, list[str]]:
    """The messages of each attempt and source, in their order."""
    streams: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        streams[f"{line.attempt}/{line.source}"].append(line.message)
    return dict(streams)


def _files(s3: Any, job_id: str, manifest: Sequence[Mapping[str, Any]]) -> list[File]:
    prefix = f"{_PREFIX}/{job_prefix(job_id)}"
    return [
        File(path=f["path"], sha256=f["sha256"], found=_sha256(s3, f"{prefix}/{f['path']}")) for f in manifest
    ]


def _sha256(s3: Any, key: str) -> str | None:
    try:
        return hashlib.sha256(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()).hexdigest()
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchKey":
            return None
        raise


def _runs(url: str) -> list[Run]:
    with httpx.Client(base_url=f"{url}/api/2.0/mlflow", trust_env=False, timeout=60) as http:
        found = http.get("/experiments/get-by-name", params={"experiment_name": "cim"})
        if found.status_code == httpx.codes.NOT_FOUND:
            return []
        wanted = {
            "experiment_ids": [found.raise_for_status().json()["experiment"]["experiment_id"]],
            "max_results": 10_000,
        }
        answer = http.post("/runs/search", json=wanted).raise_for_status().json()
        return [_run(http, run) for run in answer.get("runs", ())]


def _run(http: httpx.Client, run: Mapping[str, Any]) -> Run:
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    query = {"run_id": run["info"]["run_id"], "metric_key": curve.LOSS, "max_results": "10000"}
    answer = http.get("/metrics/get-history", params=query).raise_for_status().json()
    points = [(int(m.get("step", 0)), float(m["value"])) for m in answer.get("metrics", ())]
    return Run(job=tags[_JOB_TAG], status=run["info"]["status"], points=points)
