"""The tracker's contract on a real MLflow server, and what a person sees there."""

import re
from collections import defaultdict
from collections.abc import Mapping

import pytest
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from service.dispatch.mlflow_tracker import JOB_TAG, MlflowTracker
from service.dispatch.tracker import TrackerFailedError, TrackerRefusedError, TrackerUnavailableError
from service.local_servers import free_ports
from tests.fakes.tracker_contract import TrackerContract, new_run


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "1", "TIMEOUT": "60"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)


class TestMlflowTracker(TrackerContract):
    @pytest.fixture
    def tracker(self, mlflow_url: str) -> MlflowTracker:
        return MlflowTracker(mlflow_url, experiment="contract")

    @pytest.fixture
    def record(self, mlflow_url: str) -> "MlflowRecord":
        return MlflowRecord(mlflow_url)


class MlflowRecord:
    def __init__(self, url: str) -> None:
        self._client = MlflowClient(tracking_uri=url)

    def points(self, run_id: str) -> Mapping[tuple[str, int], list[float]]:
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for key in self._client.get_run(run_id).data.metrics:
            for metric in self._client.get_metric_history(run_id, key):
                found[key, metric.step].append(metric.value)
        return found

    def pictures(self, run_id: str) -> list[tuple[str, int]]:
        paths = [entry.path for entry in self._client.list_artifacts(run_id, "images")]
        found = [re.match(r"images/(\w+)\+step\+(\d+)\+.*\.png$", path) for path in paths]
        by_step = sorted((match[1], int(match[2])) for match in found if match)
        for series, step in by_step:
            named = [entry.path for entry in self._client.list_artifacts(run_id, series)]
            assert f"{series}/step-{step}.png" in named
        return by_step

    def status(self, run_id: str) -> tuple[str, str]:
        run = self._client.get_run(run_id)
        return run.info.status, run.data.tags["mlflow.note.content"]

    def params(self, run_id: str) -> Mapping[str, str]:
        return dict(self._client.get_run(run_id).data.params)

    def double(self, run_id: str) -> str:
        run = self._client.get_run(run_id)
        made = self._client.create_run(run.info.experiment_id, tags={JOB_TAG: run.data.tags[JOB_TAG]})
        return str(made.info.run_id)

    def is_listed(self, run_id: str) -> bool:
        return bool(self._client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)

    def delete(self, run_id: str) -> None:
        self._client.delete_run(run_id)


async def test_run__has_name_tags_and_every_parameter(mlflow_url: str) -> None:
    new = new_run()
    run_id = await MlflowTracker(mlflow_url, experiment="shown").ensure_run(new)
    run = MlflowClient(tracking_uri=mlflow_url).get_run(run_id)
    assert run.info.run_name == new.name
    assert run.data.tags["cim.job_id"] == new.job_id
    assert run.data.tags["cim.kind"] == "pretrain"
    assert run.data.params == new.params
    assert len(new.params) > 100  # more than one call takes


async def test_no_server__is_unavailable_not_refused() -> None:
    (port,) = free_ports(1)
    tracker = MlflowTracker(f"http://127.0.0.1:{port}", experiment="nowhere")
    with pytest.raises(TrackerUnavailableError, match=str(port)):
        await tracker.ensure_run(new_run())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("BAD_REQUEST", TrackerFailedError),
        ("INVALID_PARAMETER_VALUE", TrackerRefusedError),
        ("INTERNAL_ERROR", TrackerUnavailableError),
    ],
)
async def test_errors__a_clash_in_the_servers_database_is_not_a_refusal(
    monkeypatch: pytest.MonkeyPatch, code: str, kind: type[Exception]
) -> None:
    def clash(*_: object, **__: object) -> None:
        told = "(sqlite3.IntegrityError) UNIQUE constraint failed: params.key"
        raise MlflowException(told, error_code=getattr(databricks_pb2, code))

    monkeypatch.setattr(MlflowClient, "log_batch", clash)
    with pytest.raises(kind, match="UNIQUE constraint"):
        await MlflowTracker("http://mlflow.test", experiment="clash").log_points("run", [])
