"""Runs in MLflow: the only place that writes them.

A sweep is a parent run, each of its trials a child run. Everything goes through `MlflowClient` with explicit run ids,
never through MLflow's active run: what happens to a run depends on no state but the store's.

Delivering anything twice changes nothing: a point is known by (metric, step), a param once written is left alone, and a
trial or study that is started again goes on in the run it already has.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

from agnews_lora.errors import StorageError
from agnews_lora.tracking.store import experiment_id, is_server, reaching
from agnews_lora.training.contracts import EvalPoint, TrainPoint

State = Literal["COMPLETE", "PRUNED", "FAILED", "INTERRUPTED"]

# MLflow has no status of its own for pruned and interrupted runs: the tag `state` tells them apart.
RUN_STATUS: Final[dict[State, str]] = {
    "COMPLETE": "FINISHED",
    "PRUNED": "KILLED",
    "FAILED": "FAILED",
    "INTERRUPTED": "KILLED",
}
METRICS: Final = ("train/loss", "train/learning_rate", "eval/accuracy", "eval/macro_f1", "eval/loss")
CHECKPOINTS: Final = "checkpoints"  # artifact folder of a trial that has not ended
KEPT_CHECKPOINTS: Final = 2
SECONDS_BETWEEN_CHECKPOINTS: Final = 60.0
MAX_METRICS_PER_BATCH: Final = 1000  # MLflow's limit
MAX_DIGEST_LENGTH: Final = 36  # MLflow's limit
_CHECKPOINT: Final = re.compile(rf"{CHECKPOINTS}/checkpoint-\d+")
ERROR_TAG_LENGTH: Final = 500
DATASET_SCHEMA: Final = json.dumps(
    {
        "mlflow_colspec": [
            {"type": "string", "name": "text", "required": True},
            {"type": "long", "name": "label", "required": True},
        ]
    }
)


@dataclass
class _OpenRun:
    """A run being written. points: every (metric, step) it has, and its value; buffer: those not yet in the store.

    checkpointed: when a checkpoint was last kept with it, in seconds of a monotonic clock.
    """

    run_id: str
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    buffer: list[Metric] = field(default_factory=list)
    checkpointed: float = float("-inf")

    def add(self, key: str, value: float, step: int, timestamp: int) -> None:
        if (key, step) not in self.points:
            self.points[key, step] = value
            self.buffer.append(Metric(key, value, timestamp, step))


class SweepRuns:
    """The runs of one sweep: its parent run and one child run a trial.

    Without `open_parent` the trials are runs of their own: so is a single training.

    Raises:
        StorageError: the MLflow experiment was deleted, or its artifacts belong to another folder of stores.
    """

    def __init__(self, client: MlflowClient, experiment_name: str, sweep_name: str) -> None:
        self.client = client
        self._experiment_id = experiment_id(client, experiment_name)
        self._sweep_name = sweep_name
        self._parent: str | None = None
        self._trials: dict[str, _OpenRun] = {}
        self._datasets: list[DatasetInput] = []

    def reaching(self) -> AbstractContextManager[None]:
        """A context in which what MLflow raises of a store that cannot be read or written is a StorageError."""
        return reaching(self.client)

    def open_parent(
        self,
        study_name: str,
        *,
        identity: str = "",
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        texts: Mapping[str, str],
    ) -> str:
        """The run id of the study's parent run: the one that it has, running again, or a new one of the study's name.

        identity: tells the study from another that had its name before, in a storage that was moved away. texts:
        content of text artifacts by file name.
        """
        run = self._find(f"tags.kind = 'sweep' AND tags.study = '{study_name}' AND tags.study_id = '{identity}'")
        if run is None:
            own = {"kind": "sweep", "study": study_name, "study_id": identity, "sweep": self._sweep_name}
            run = self.client.create_run(self._experiment_id, run_name=study_name, tags=own)
        self._parent = run.info.run_id
        self._start(run, params, tags)
        for name, text in texts.items():
            self.client.log_text(self._parent, text, name)
        return self._parent

    def join_parent(self, study_name: str, identity: str) -> None:
        """Take the parent run that another process opened as the parent of what is started here.

        Raises:
            StorageError: there is none in this store.
        """
        run = self._find(f"tags.kind = 'sweep' AND tags.study = '{study_name}' AND tags.study_id = '{identity}'")
        if run is None:
            raise StorageError(
                f"the run store {self.client.tracking_uri} must have the parent run of study {study_name}, but has "
                "none; give the --tracking that the sweep was started with"
            )
        self._parent = run.info.run_id

    def log_dataset(
        self, name: str, digest: str, *, num_rows: int, profile: Mapping[str, Any], source: str, context: str
    ) -> None:
        """Log a data set as input of the parent run, and of every trial that starts from now on.

        digest: ours, of all rows, cut to MLflow's length (MLflow's own samples rows). profile: numbers to show beside
        `num_rows`. source: where the rows come from, in words. context: what they are for (`training`, `validation`).
        """
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST_LENGTH],
            source_type="code",
            source=json.dumps({"tags": {"source": source}}),
            schema=DATASET_SCHEMA,
            profile=json.dumps({"num_rows": num_rows, **profile}),
        )
        dataset_input = DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
        self._datasets.append(dataset_input)
        if self._parent is not None:
            self.client.log_inputs(self._parent, [dataset_input])

    def start_trial(
        self, trial: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str], run_id: str | None = None
    ) -> str:
        """The run id of a trial, running: the run that it already has (with the points in it), or a new one.

        run_id: what the study knows. Where it knows none, a run that was created just before a kill is still found.
        """
        run = self._active_run(run_id) if run_id else None
        run = run or self._child(trial)
        if run is None:
            own = {"kind": "trial", "trial": trial, "sweep": self._sweep_name}
            if self._parent is not None:
                own[MLFLOW_PARENT_RUN_ID] = self._parent
            run = self.client.create_run(self._experiment_id, run_name=name, tags=own)
        self._trials[trial] = _OpenRun(run.info.run_id, self._read_points(run))
        self._start(run, params, tags)
        if self._datasets:
            self.client.log_inputs(run.info.run_id, self._datasets)
        return run.info.run_id

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        """Log points of a trial by step, with their own timestamps. Known ones are skipped."""
        run = self._trials[trial]
        for point in points:
            for key, value in _metrics_of(point).items():
                run.add(key, value, point.step, point.timestamp)
        self._flush(run)

    def finish_trial(
        self,
        trial: str,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        error: str | None = None,
        adapter: Path | None = None,
        figures: Mapping[str, Path] | None = None,
    ) -> None:
        """End a trial's run. Its status comes last: a run that has ended has all that belongs to it.

        metrics: single values of the whole trial. error: text of a failure, in full as `error.txt`. adapter: folder
        that becomes the artifact `adapter`. figures: files by artifact name.
        """
        run = self._trials[trial]
        last_step = max((step for _, step in run.points), default=0)
        for key, value in (metrics or {}).items():
            run.add(key, value, last_step, _now())
        self._flush(run)
        if adapter is not None:
            self.client.log_artifacts(run.run_id, str(adapter), "adapter")
        self._log_files(run.run_id, figures or {})
        if state != "INTERRUPTED" and is_server(self.client) and self._kept(run.run_id):
            self._artifacts(run.run_id).delete_artifacts(CHECKPOINTS)
        own = {}
        if error is not None:
            self.client.log_text(run.run_id, error, "error.txt")
            own["error"] = error[:ERROR_TAG_LENGTH]
        self._end(run.run_id, state, {**own, **(tags or {})})

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None:
        """Keep the newest two checkpoints among the run's artifacts, for whoever goes on with the trial elsewhere.

        Only where the store is a server, and at most once a minute: on one machine the work folder is enough.
        """
        run = self._trials[trial]
        if not is_server(self.client) or time.monotonic() - run.checkpointed < SECONDS_BETWEEN_CHECKPOINTS:
            return
        self.client.log_artifacts(run.run_id, str(checkpoint), f"{CHECKPOINTS}/{checkpoint.name}")
        run.checkpointed = time.monotonic()
        for old in self._kept(run.run_id)[:-KEPT_CHECKPOINTS]:
            self._artifacts(run.run_id).delete_artifacts(old)

    def fetch_checkpoints(self, trial: str, folder: Path) -> None:
        """Download the checkpoints that were kept into a folder, beside those that are there."""
        run = self._trials[trial]
        if not is_server(self.client):
            return
        for kept in self._kept(run.run_id):
            there = folder / Path(kept).name
            if not there.exists():
                with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as beside:
                    Path(self.client.download_artifacts(run.run_id, kept, beside)).replace(there)

    def _kept(self, run_id: str) -> list[str]:
        """Artifact paths of the kept checkpoints, the oldest first."""
        found = [item.path for item in self.client.list_artifacts(run_id, CHECKPOINTS) if item.is_dir]
        return sorted(
            (path for path in found if _CHECKPOINT.fullmatch(path)), key=lambda path: int(path.split("-")[-1])
        )

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        """The client has no call that removes an artifact; its repository has."""
        uri = self.client.get_run(run_id).info.artifact_uri
        return get_artifact_repository(uri, tracking_uri=self.client.tracking_uri)

    def close_parent(
        self,
        state: State,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Mapping[str, Path] | None = None,
    ) -> None:
        """End the parent run. metrics: the study's results. artifacts: files by artifact name."""
        parent = self._require_parent()
        self._log_files(parent, artifacts or {})
        values = [Metric(key, value, _now(), 0) for key, value in (metrics or {}).items()]
        self.client.log_batch(parent, metrics=values)
        self._end(parent, state, tags or {})

    def log_leaderboard(self, table: pd.DataFrame) -> None:
        """Save the trials' table on the parent run, as `leaderboard.csv` and as the table MLflow's UI shows."""
        parent = self._require_parent()
        self.client.log_text(parent, table.to_csv(index=False), "leaderboard.csv")
        # `log_table` would append to the rows of an earlier session.
        self.client.log_text(parent, table.to_json(orient="split", index=False), "leaderboard.json")
        shown = json.dumps([{"path": "leaderboard.json", "type": "table"}])
        self.client.set_tag(parent, MLFLOW_LOGGED_ARTIFACTS, shown)

    def curve(self, trial: str) -> pd.DataFrame:
        """Points of a trial so far: one row a step, ascending, with columns `trial`, `step` and the names in `METRICS`.

        NaN where a metric was not measured at a step; no rows where the trial has no run.
        """
        points = self._trials[trial].points if trial in self._trials else self._stored_points(trial)
        steps = sorted({step for key, step in points if key in METRICS})
        columns = {key: [points.get((key, step), float("nan")) for step in steps] for key in METRICS}
        return pd.DataFrame({"trial": [trial] * len(steps), "step": steps, **columns})

    def _require_parent(self) -> str:
        assert self._parent is not None, "open_parent comes first"
        return self._parent

    def _find(self, filter_string: str) -> Run | None:
        runs = self.client.search_runs([self._experiment_id], filter_string, max_results=1)
        return runs[0] if runs else None

    def _child(self, trial: str) -> Run | None:
        """The run that a trial has under the parent run."""
        if self._parent is None:
            return None
        return self._find(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self._parent}' AND tags.trial = '{trial}'")

    def _active_run(self, run_id: str) -> Run | None:
        """The run, unless someone deleted it."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == LifecycleStage.ACTIVE else None

    def _start(self, run: Run, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        self.client.log_batch(run.info.run_id, params=new, tags=_run_tags({**tags, "state": "RUNNING"}))

    def _end(self, run_id: str, state: State, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=_run_tags({**tags, "state": state}))
        self.client.set_terminated(run_id, RUN_STATUS[state])

    def _flush(self, run: _OpenRun) -> None:
        for start in range(0, len(run.buffer), MAX_METRICS_PER_BATCH):
            self.client.log_batch(run.run_id, metrics=run.buffer[start : start + MAX_METRICS_PER_BATCH])
        run.buffer.clear()

    def _log_files(self, run_id: str, files: Mapping[str, Path]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                shutil.copyfile(path, Path(folder, name))
            self.client.log_artifacts(run_id, folder)

    def _read_points(self, run: Run) -> dict[tuple[str, int], float]:
        """All points in the store by (metric, step)."""
        histories = [self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
        return {(metric.key, metric.step): metric.value for history in histories for metric in history}

    def _stored_points(self, trial: str) -> dict[tuple[str, int], float]:
        run = self._child(trial)
        return self._read_points(run) if run is not None else {}


def _metrics_of(point: TrainPoint | EvalPoint) -> dict[str, float]:
    if isinstance(point, EvalPoint):
        return {"eval/accuracy": point.accuracy, "eval/macro_f1": point.macro_f1, "eval/loss": point.loss}
    return {"train/loss": point.loss, "train/learning_rate": point.learning_rate}


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def _now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
