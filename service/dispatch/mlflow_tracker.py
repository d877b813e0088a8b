"""The tracker on MLflow. The only module that imports mlflow, which takes seconds to load.

The client blocks, so each call runs in a thread. Retries and timeouts are MLflow's own, set through
`CLIENT_ENVIRONMENT`, which the entry point puts into the environment before it imports this.
"""

import asyncio
import io
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from PIL import Image

from service.dispatch.tracker import (
    NewRun,
    Outcome,
    Picture,
    Point,
    TrackerFailedError,
    TrackerRefusedError,
    TrackerUnavailableError,
)

Result = TypeVar("Result")
JOB_TAG = "cim.job_id"
_NOTE_TAG = "mlflow.note.content"
_RUNNING = "RUNNING"
_MAX_PARAMS = 100
_FOR_EVER = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})
# Not the caller's fault: MLflow says so of whatever its database refuses, e.g. the parameters of a run
# that come a second time, after a time-out, while the first ones are being stored.
_CLASHED = "BAD_REQUEST"


class MlflowTracker:
    """One experiment of one MLflow server."""

    def __init__(self, url: str, *, experiment: str) -> None:
        self._url, self._experiment = url, experiment
        self._client = MlflowClient(tracking_uri=url)
        self._experiment_id: str | None = None

    async def check(self) -> None:
        """Ask for the experiment, whose name is anything that exists."""
        await self._call(self._client.get_experiment_by_name, self._experiment)

    async def ensure_run(self, run: NewRun) -> str:
        """Search by the job's tag first: an earlier try may have made the run and lost the reply."""
        return await self._call(self._ensure_run, run)

    async def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """MLflow drops a point that it holds already."""
        metrics = [Metric(p.key, p.value, _ms(p.at), p.step) for p in points]
        await self._call(self._client.log_batch, run_id, metrics=metrics)

    async def log_picture(self, run_id: str, picture: Picture) -> None:
        """Show the picture under the run's metrics, with a slider over its steps."""
        await self._call(self._log_picture, run_id, picture)

    async def close(self, run_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        """Set the final description and status."""
        await self._call(self._client.set_tag, run_id, _NOTE_TAG, description)
        await self._call(self._client.set_terminated, run_id, str(outcome), _ms(ended_at))

    async def abandon(self, job_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        """Looked up by the job's tag: a run that was refused half-way has told nobody its id."""
        for run in await self._call(self._runs_of, job_id, ViewType.ACTIVE_ONLY):
            if run.info.status == _RUNNING:
                run_id = str(run.info.run_id)
                await self.close(run_id, outcome, ended_at=ended_at, description=description)

    async def keep_only(self, run_id: str, *, job_id: str) -> None:
        """MLflow keeps what is deleted for its users to restore, until `mlflow gc`."""
        await self._call(self._keep_only, run_id, job_id)

    def _keep_only(self, run_id: str, job_id: str) -> None:
        for run in self._runs_of(job_id, ViewType.ACTIVE_ONLY):
            if run.info.run_id != run_id:
                self._client.delete_run(run.info.run_id)

    def _runs_of(self, job_id: str, view: int) -> list[Run]:
        wanted = f"tags.`{JOB_TAG}` = '{job_id}'"
        return list(self._client.search_runs([self._ensure_experiment()], wanted, view))

    def _ensure_run(self, run: NewRun) -> str:
        found = next(iter(self._runs_of(run.job_id, ViewType.ALL)), None)
        made = found or self._create(run)
        run_id = str(made.info.run_id)
        # An earlier try may have ended between the run and its parameters. One that is there stays: MLflow
        # refuses another value, which a job has that was planned anew since.
        missing = [Param(key, value) for key, value in run.params.items() if key not in made.data.params]
        for params in _portions(missing, _MAX_PARAMS):
            self._client.log_batch(run_id, params=params)
        if made.info.status != _RUNNING:
            # A job that its user tries again goes on in its run.
            self._client.update_run(run_id, status=_RUNNING)
        return run_id

    def _create(self, run: NewRun) -> Run:
        tags = {**run.tags, JOB_TAG: run.job_id, _NOTE_TAG: run.description}
        return self._client.create_run(self._ensure_experiment(), _ms(run.started_at), tags, run.name)

    def _ensure_experiment(self) -> str:
        if self._experiment_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            made = found.experiment_id if found else self._client.create_experiment(self._experiment)
            self._experiment_id = str(made)
        return self._experiment_id

    def _log_picture(self, run_id: str, picture: Picture) -> None:
        # MLflow adds a random part to the name, so it cannot tell a repetition by itself.
        start = f"images/{picture.series}+step+{picture.step}+"
        if any(entry.path.startswith(start) for entry in self._client.list_artifacts(run_id, "images")):
            return
        image = Image.open(io.BytesIO(picture.png)).convert("RGB")
        # Twice: under a plain name for the page of artifacts, and by step for the chart with a slider.
        self._client.log_image(run_id, image, f"{picture.series}/step-{picture.step}.png")
        self._client.log_image(
            run_id, image, key=picture.series, step=picture.step, timestamp=_ms(picture.at), synchronous=True
        )

    async def _call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except MlflowException as error:
            told = f"MLflow at {self._url}: {str(error).splitlines()[0][:500]}"
            if error.error_code in _FOR_EVER:
                raise TrackerRefusedError(told) from error
            if error.error_code == _CLASHED:
                raise TrackerFailedError(told) from error
            raise TrackerUnavailableError(told) from error
        except (requests.RequestException, OSError) as error:
            raise TrackerUnavailableError(f"MLflow at {self._url} does not answer: {error}") from error


def _portions(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
