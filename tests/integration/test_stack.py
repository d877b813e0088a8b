"""The demo's three jobs on PostgreSQL, an S3 server, an MLflow server and Ray, all real processes."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import boto3
import httpx
import psycopg
import pytest
from mlflow import MlflowClient

from service.client import Client
from service.contracts.jobs import FINAL, JobView
from service.local_servers import free_ports
from tests.acceptance.embedded import specs
from tests.integration.servers import S3_KEYS, RayCluster, server

BUCKET = "cim-stack"
PATIENCE_S = 600


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The addresses of everything."""

    client: Client
    database: str  # for psycopg
    s3_url: str
    mlflow: MlflowClient

    def finished(self, job_id: str) -> JobView:
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.client.job(job_id)).state not in FINAL:
            assert time.monotonic() < deadline, f"{job.name} is still {job.state}: {job.reason}"
            time.sleep(0.5)
        assert job.state == "succeeded", f"{job.name}: {job.reason}"
        return job

    def objects(self, prefix: str) -> dict[str, int]:
        s3 = boto3.client("s3", endpoint_url=self.s3_url)
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

    def bytes(self, key: str) -> bytes:
        s3 = boto3.client("s3", endpoint_url=self.s3_url)
        content: bytes = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content


@pytest.fixture(scope="module")
def stack(
    ray_cluster: RayCluster,
    mlflow_url: str,
    s3_url: str,
    postgres_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """API and dispatcher as processes of their own, on a bucket and a database of their own."""
    folder = tmp_path_factory.mktemp("stack")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE stack")
    database = postgres_server.replace("/postgres?", "/stack?", 1)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    env = {
        **os.environ,
        **S3_KEYS,
        "CIM_DATA_DIR": str(folder),
        "CIM_DATABASE_URL": database.replace("postgresql://", "postgresql+psycopg://", 1),
        "CIM_STORE_URL": f"s3://{BUCKET}/artifacts",
        "CIM_S3_ENDPOINT_URL": s3_url,
        "CIM_S3_REGION": "us-east-1",
        "CIM_ALLOWED_STORAGE": "/",
        "CIM_SHARED_FILESYSTEM": "true",
        "CIM_RAY_URL": ray_cluster.url,
        "CIM_RAY_TOKEN": ray_cluster.token,
        "CIM_MLFLOW_URL": mlflow_url,
        "CIM_PORT": str(port),
        "CIM_PUBLIC_URL": url,
        "CIM_SECRET": "s" * 32,
        "CIM_WORKER_PYTHON": sys.executable,
    }
    for name, value in S3_KEYS.items():
        os.environ.setdefault(name, value)
    boto3.client("s3", endpoint_url=s3_url).create_bucket(Bucket=BUCKET)

    def ready() -> bool:
        return httpx.get(f"{url}/readyz", trust_env=False).is_success

    def at_once() -> bool:
        return True

    with ExitStack() as running:
        for name, condition in (("migrate", None), ("api", ready), ("dispatcher", at_once)):
            command = [sys.executable, "-m", "service", name]
            if condition is None:
                _run(command, env=env)
                continue
            running.enter_context(server(name, command, env=env, folder=folder, ready=condition))
        yield Stack(client=Client(url), database=database, s3_url=s3_url, mlflow=MlflowClient(mlflow_url))


def _run(command: list[str], *, env: dict[str, str]) -> None:
    status = os.spawnve(os.P_WAIT, command[0], command, env)
    assert status == 0, f"{command} ended with status {status}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_jobs__leave_a_consistent_trace_everywhere(stack: Stack) -> None:
    tokenizer, pretrain, evaluate = stack.client.submit(
        [
            specs.tokenizer("stack-tokenizer", steps=20),
            specs.pretrain(
                "stack-pretrain",
                "job:stack-tokenizer",
                enhancer=specs.VIT,
                objective="revdet",
                probe={"train": str(specs.TRAIN_TAR), "val": str(specs.VAL_TAR), "every": {"steps": 10}},
                resources={"workers": 2, "cpus_per_worker": 1},
            ),
            specs.evaluate("stack-evaluate", "job:stack-pretrain"),
        ]
    )
    jobs = [stack.finished(job.id) for job in (tokenizer, pretrain, evaluate)]

    _assert_database(stack, jobs)
    for job in jobs:
        _assert_bucket(stack, job)
    _assert_mlflow(stack, jobs)
    table = json.loads(stack.client.read(evaluate.id, "result.json"))["table"]
    assert [row["encoder"] for row in table] == ["cim", "random"]
    assert {row["classes"] for row in table} == {10}
    assert [point.step for point in stack.client.metrics(pretrain.id, key="probe_knn_top1")] == [10, 20]
    assert b'"skipped": []' in stack.client.read(pretrain.id, "data/report.json")


def _assert_database(stack: Stack, jobs: list[JobView]) -> None:
    ids = [job.id for job in jobs]
    with psycopg.connect(stack.database) as connection:
        states = connection.execute("SELECT state FROM jobs WHERE id = ANY(%s)", (ids,)).fetchall()
        assert states == [("succeeded",)] * 3
        outcomes = connection.execute("SELECT number, outcome FROM attempts").fetchall()
        assert outcomes == [(1, "succeeded")] * 3
        steps = connection.execute(
            "SELECT step FROM metrics WHERE job_id = %s AND key = 'mim_loss' ORDER BY step", (ids[1],)
        ).fetchall()
        assert [step for (step,) in steps] == [1, 5, 10, 15, 20]
        saved = connection.execute("SELECT step FROM checkpoints WHERE job_id = %s ORDER BY step", (ids[1],))
        assert saved.fetchall() == [(10,), (20,)]


def _assert_bucket(stack: Stack, job: JobView) -> None:
    prefix = f"artifacts/jobs/{job.id}/"
    stored = {key.removeprefix(prefix): size for key, size in stack.objects(prefix).items()}
    result = json.loads(stack.client.read(job.id, "result.json"))
    assert result["metrics"] == job.metrics
    assert "spec.json" in {entry["path"] for entry in result["files"]}
    for entry in result["files"]:
        assert stored[entry["path"]] == entry["size"]
        assert hashlib.sha256(stack.bytes(prefix + entry["path"])).hexdigest() == entry["sha256"]
    assert any(path.startswith("logs/attempt-1/") for path in stored)


def _assert_mlflow(stack: Stack, jobs: list[JobView]) -> None:
    for job in jobs:
        run = _closed_run(stack, job)
        assert run.info.status == "FINISHED"
        assert run.data.tags["cim.job_id"] == job.id
        assert job.id in run.data.tags["mlflow.note.content"]
    pretrain = jobs[1]
    assert pretrain.mlflow_run_id is not None
    params = stack.mlflow.get_run(pretrain.mlflow_run_id).data.params
    assert params["model.objective.name"] == "revdet"
    assert params["training.steps"] == "20"
    curve = stack.mlflow.get_metric_history(pretrain.mlflow_run_id, "mim_loss")
    assert [point.step for point in curve] == [1, 5, 10, 15, 20]
    ours = {point.step: point.value for point in stack.client.metrics(pretrain.id, key="mim_loss")}
    assert {point.step: point.value for point in curve} == pytest.approx(ours)
    assert _pictures(stack, pretrain.mlflow_run_id, "") >= 1


def _closed_run(stack: Stack, job: JobView) -> Any:
    """The job's MLflow run, once the dispatcher has forwarded everything and closed it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        run_id = stack.client.job(job.id).mlflow_run_id
        run = stack.mlflow.get_run(run_id) if run_id else None
        if run is not None and run.info.status != "RUNNING":
            return run
        assert time.monotonic() < deadline, f"the MLflow run of {job.name} is not closed"
        time.sleep(0.5)


def _pictures(stack: Stack, run_id: str, path: str) -> int:
    count = 0
    for entry in stack.mlflow.list_artifacts(run_id, path):
        count += _pictures(stack, run_id, entry.path) if entry.is_dir else entry.path.endswith(".png")
    return count
