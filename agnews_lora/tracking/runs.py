"""Runs in MLflow: the only place that writes them.

A sweep is a parent run, each of its trials a child run. Everything goes through `MlflowClient` with explicit run ids,
never through MLflow's active run: what happens to a run depends on no state but the store's.

Delivering anything twice changes nothing: a point is known by (metric, step), a param once written is left alone, and a
trial or study that is started again goes on in the run it already has.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
)

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError
from agnews_lora.tracking.descriptions import beside_notes, trial_description
from agnews_lora.tracking.store import experiment_id, name_of, reaching, require_active
from agnews_lora.tracking.views import NUMBER, address, share_view
from agnews_lora.training.interface import COSTS, EvalPoint, RunState, TrainPoint, TrialEnd, timestamp

MAX_DIGEST_LENGTH: Final = 36  # MLflow's limit
COLUMNS: Final = {"text": "string", "label": "long"}  # of a data set, with MLflow's types
METRICS: Final = ("train/loss", "train/learning_rate", "eval/accuracy", "eval/macro_f1", "eval/loss", "eval/rows")


Points = dict[tuple[str, int], Metric]  # of a run, by metric and step


@dataclass
class TrialRun:
    """A trial's run. started: in ms since 1970. points: all it has; buffer: those not yet in the store."""

    run_id: str
    started: int
    points: Points
    name: str = ""
    spec: TrialSpec | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    buffer: list[Metric] = field(default_factory=list)

    def add(self, key: str, value: float, step: int, timestamp: int) -> None:
        """Buffer a point, unless it is known."""
        if (key, step) not in self.points:
            self.points[key, step] = Metric(key, value, timestamp, step)
            self.buffer.append(self.points[key, step])


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Read a run; None where someone deleted it."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def points_of(client: MlflowClient, run: Run) -> Points:
    """Read all points of a run."""
    histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    return {(point.key, point.step): point for history in histories for point in history}


def curve_of(points: Points, trial: str) -> pd.DataFrame:
    """One row per step, ascending, with columns `trial`, `step` and those of `METRICS`; NaN: not measured."""
    steps = sorted({step for key, step in points if key in METRICS})
    columns = {
        key: [points[key, step].value if (key, step) in points else float("nan") for step in steps] for key in METRICS
    }
    return pd.DataFrame({"trial": [trial] * len(steps), "step": steps, **columns})


def metrics_of(point: TrainPoint | EvalPoint) -> dict[str, float]:
    """What a point measured, by MLflow's names."""
    if isinstance(point, EvalPoint):
        scores = {"eval/accuracy": point.accuracy, "eval/macro_f1": point.macro_f1, "eval/loss": point.loss}
        return scores | {"eval/rows": point.rows}
    return {"train/loss": point.loss, "train/learning_rate": point.learning_rate}


MAX_DESCRIPTION: Final = 8000  # characters: MLflow's limit of a tag


def description(markdown: str, present: Mapping[str, str]) -> dict[str, str]:
    """The tag that is a run's description. present: the run's tags."""
    return {MLFLOW_RUN_NOTE: beside_notes(markdown, present.get(MLFLOW_RUN_NOTE), MAX_DESCRIPTION)}


def page_of(client: MlflowClient, run_id: str) -> "RunPage":
    """The page of a run, wherever it is in the store."""
    return RunPage(client, client.get_run(run_id).info.experiment_id, run_id)


class RunPage:
    """One run's page. Writing anything twice leaves it as if it was written once, but for a metric's time."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self.experiment_id = experiment_id

    def parent(self) -> "RunPage | None":
        """The page of the run above this one, where there is one that nobody deleted."""
        above = self._client.get_run(self.run_id).data.tags.get(MLFLOW_PARENT_RUN_ID)
        return RunPage(self._client, self.experiment_id, above) if above and find_run(self._client, above) else None

    def describe(self, markdown: str) -> None:
        """Replace our part of the description."""
        self.set_tags(description(markdown, self._client.get_run(self.run_id).data.tags))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, all at once."""
        self._client.log_batch(self.run_id, tags=_run_tags(tags), synchronous=True)

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Save a table as `<name>.csv`, and as `<name>.json`, which the UI shows as a table."""
        self._client.log_text(self.run_id, table.to_csv(index=False), f"{name}.csv")
        # `MlflowClient.log_table` would append to the rows of an earlier session.
        self._client.log_text(self.run_id, table.to_json(orient="split", index=False), f"{name}.json")
        entry = {"path": f"{name}.json", "type": "table"}
        listed = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if entry not in listed:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]), synchronous=True)

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save files under their artifact names, which may have folders."""
        with tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                there = Path(folder, name)
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, there)
            self._client.log_artifacts(self.run_id, folder)

    def read_text(self, name: str) -> str | None:
        """Content of a text artifact, or None where the run has none of that name."""
        folder_name = str(Path(name).parent)
        listed = self._client.list_artifacts(self.run_id, None if folder_name == "." else folder_name)
        if all(item.path != name for item in listed):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(self.run_id, name, folder)).read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """Of the page, relative to the UI that shows a description."""
        return address(self._path)

    @property
    def _path(self) -> str:
        return f"experiments/{self.experiment_id}/runs/{self.run_id}"

    def artifact_url(self, name: str) -> str:
        """Of the page that shows an artifact."""
        return address(f"{self._path}/artifacts/{quote(name)}")

    def image_url(self, name: str) -> str:
        """Of an artifact's bytes, for a picture in a description."""
        return f"get-artifact?path={quote(name, safe='')}&run_uuid={self.run_id}"


# MLflow has no status of its own for pruned and interrupted runs: the tag `state` tells them apart.
RUN_STATUS: Final[dict[RunState, str]] = {
    "COMPLETE": "FINISHED",
    "PRUNED": "KILLED",
    "FAILED": "FAILED",
    "INTERRUPTED": "KILLED",
}
MAX_METRICS_PER_BATCH: Final = 1000  # MLflow's limit
ERROR_TAG_LENGTH: Final = 500


class SweepRuns:
    """The runs of one sweep: its parent run and one child run a trial. It is the driver's tracker.

    Without `open_parent` the trials are runs of their own: so is a single training.

    Args:
        sweep: its name, which is that of the MLflow experiment too.
        params, tags: what every trial's run carries beside its own.
        draw: draws a trial's curves, given its points and name, into a folder; returns them by artifact name.

    Raises:
        StorageError: the MLflow experiment was deleted, or its artifacts belong to another folder of stores.
    """

    def __init__(
        self,
        client: MlflowClient,
        sweep: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        draw: Callable[[pd.DataFrame, str, Path], Mapping[str, Path]] = lambda curve, name, folder: {},
    ) -> None:
        self.client = client
        self._experiment_id = experiment_id(client, sweep)
        self._sweep = sweep
        self._params, self._tags = dict(params or {}), dict(tags or {})
        self._draw = draw
        self.links: dict[str, str] = {}  # of the study's pages in the UI, as `share_view` gives them
        self._parent: str | None = None
        self._study_name: str | None = None
        self._identity = ""
        self._was_complete = False  # the parent run, before it was opened again
        self._trials: dict[str, TrialRun] = {}
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
        found = self._search(f"tags.kind = 'sweep' AND tags.study = '{study_name}' AND tags.study_id = '{identity}'")
        if found:
            run = found[0]
        else:
            number = 1 + max(map(_number, self._search("tags.kind = 'sweep'")), default=0)
            own = {"kind": "sweep", "study": study_name, "study_id": identity, "sweep": self._sweep}
            own[NUMBER] = str(number)
            run = self.client.create_run(self._experiment_id, run_name=study_name, tags=own)
        self._was_complete = run.data.tags.get("state") == "COMPLETE"
        self._parent, self._study_name, self._identity = run.info.run_id, study_name, identity
        if not found:  # the one that there was may have been deleted
            for child in self._children():
                self.client.set_tag(child.info.run_id, MLFLOW_PARENT_RUN_ID, self._parent, synchronous=True)
        self._start(run, params, tags)
        self.links = share_view(self.client, run, params.get("objective", "accuracy"))
        for name, text in texts.items():
            self.client.log_text(self._parent, text, name)
        return self._parent

    def log_dataset(
        self, name: str, digest: str, *, num_rows: int, profile: Mapping[str, Any], source: str, context: str
    ) -> None:
        """Log a data set as input of the parent run, and of every trial that starts from now on.

        Args:
            digest: of all rows (MLflow's own samples rows); cut to MLflow's length.
            profile: numbers to show beside `num_rows`.
            source: where the rows come from, in words.
            context: what they are for (`training`, `validation`).
        """
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST_LENGTH],
            source_type="code",
            source=json.dumps({"tags": {"source": source}}),
            schema=json.dumps(
                {"mlflow_colspec": [{"type": kind, "name": name, "required": True} for name, kind in COLUMNS.items()]}
            ),
            profile=json.dumps({"num_rows": num_rows, **profile}),
        )
        self._datasets.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
        if self._parent is not None:
            self.client.log_inputs(self._parent, self._datasets[-1:])

    def start_trial(self, trial: str, spec: TrialSpec, facts: Mapping[str, Any], run_id: str | None) -> str:
        """The run id of a trial, running: the run that it already has (with the points in it), or a new one.

        Args:
            facts: `seed`, `trainable_parameters`, `baseline`, and `study_trial` or `confirms`.
            run_id: what the study knows. Where it knows none, a run that was created just before a kill is still found.

        Raises:
            StorageError: the store cannot be read or written. So it is with every method of the tracker.
        """
        with self.reaching():
            run = (find_run(self.client, run_id) if run_id else None) or self._child(trial)
            name, known = f"{trial}-{spec.targets}-r{spec.rank}", {**facts, "budget": self._params.get("budget")}
            if run is None:
                own = {"kind": "trial", "trial": trial, "study_id": self._identity, "sweep": self._sweep}
                if self._parent is not None:
                    own[MLFLOW_PARENT_RUN_ID] = self._parent
                run = self.client.create_run(self._experiment_id, run_name=name, tags=own)
            points = points_of(self.client, run)
            self._trials[trial] = TrialRun(run.info.run_id, run.info.start_time, points, name, spec, known)
            params = {
                "targets": spec.targets,
                "lora_r": spec.rank,
                "lora_alpha": f"{spec.alpha:g}",
                "lora_dropout": spec.dropout,
                "learning_rate": spec.learning_rate,
                "head": spec.head,
                **{key: facts[key] for key in ("trainable_parameters", "seed") if key in facts},
                **self._params,
            }
            tags = self._tags | {key: str(facts[key]) for key in ("study_trial", "confirms", "source") if key in facts}
            tags |= {
                "baseline": str(facts["baseline"]).lower(),
                **description(trial_description(spec, known), run.data.tags),
            }
            tags |= {"study": self._study_name} if self._study_name else {}
            self._start(run, params, tags)
            if self._datasets:
                self.client.log_inputs(run.info.run_id, self._datasets)
        return run.info.run_id

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        """Log points of a trial by step, with their own timestamps. Known ones are skipped."""
        run = self._trials[trial]
        for point in points:
            for key, value in metrics_of(point).items():
                run.add(key, value, point.step, point.timestamp)
        with self.reaching():
            self._flush(run)

    def finish_trial(self, trial: str, end: TrialEnd) -> None:
        """End a trial's run. Its status comes last: a run that has ended has all that belongs to it."""
        run, result = self._trials[trial], end.result
        assert run.spec is not None, "start_trial comes first"
        page = self.page(run.run_id)
        shown = trial_description(run.spec, run.facts, page, end)
        with self.reaching(), tempfile.TemporaryDirectory() as folder:
            present = self.client.get_run(run.run_id).data.tags
            tags = {"reason": end.reason or "", **description(shown, present)}
            if end.state == "FAILED":
                error = end.report or end.reason or ""
                self.client.log_text(run.run_id, error, "error.txt")
                tags["error"] = error[:ERROR_TAG_LENGTH]
            if result is not None:
                last_step, now = max((step for _, step in run.points), default=0), timestamp()
                for key in COSTS:
                    run.add(key, getattr(result, key), last_step, now)
                self._flush(run)
                page.log_files(self._draw(curve_of(run.points, trial), run.name, Path(folder)))
                if result.adapter is not None:
                    self.client.log_artifacts(run.run_id, str(result.adapter), "adapter")
            self._end(run.run_id, end.state, tags)

    def close_parent(
        self,
        state: RunState,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Mapping[str, Path] | None = None,
    ) -> None:
        """End the parent run. metrics: the study's results. artifacts: files by artifact name."""
        page = self.page()
        known = [self.client.get_metric_history(page.run_id, key) for key in metrics or {}]
        # MLflow shows the latest point of a step; a clock may go back.
        now = max([timestamp(), *(1 + point.timestamp for history in known for point in history)])
        page.log_files(artifacts or {})
        points = [Metric(key, value, now, 0) for key, value in (metrics or {}).items()]
        self.client.log_batch(page.run_id, points, synchronous=True)
        self._end(page.run_id, state, tags or {})

    def leave_parent(self, complete: bool) -> None:
        """End the parent run where it is not finished: as complete, where it was and still may be, or interrupted."""
        with self.reaching():
            self.close_parent("COMPLETE" if complete and self._was_complete else "INTERRUPTED")

    def page(self, run_id: str | None = None) -> RunPage:
        """The page of a run; without an id, of the parent run."""
        return RunPage(self.client, self._experiment_id, run_id or self._require_parent())

    def marked(self, tag: str) -> list[str]:
        """Ids of the runs of the study's trials whose `tag` is true."""
        return [run.info.run_id for run in self._children(f"tags.{tag} = 'true'")]

    def require_known(self, run_ids: Collection[str]) -> None:
        """Check that the store is the one that has the runs of a study.

        Raises:
            StorageError: it has none of them.
        """
        with self.reaching():
            if not run_ids or any(find_run(self.client, run_id) for run_id in run_ids):
                return
        raise StorageError(
            f"Cannot record runs in {name_of(self.client)}: none of the {len(run_ids)} runs that the study has is "
            "there. Name the store of its first start (`--tracking URL`, or no --tracking for mlruns/), restore the "
            "runs in MLflow, or start another study with `agnews-lora sweep --new`."
        )

    def curve(self, trial: str) -> pd.DataFrame:
        """Points of a trial so far, as `curve_of` gives them; no rows where the trial has no run."""
        run = self._known(trial)
        return curve_of(run.points if run else {}, trial)

    def times(self, trial: str) -> list[float]:
        """When a trial's run started and reported, ascending, in seconds since 1970; empty where it has no run."""
        if (run := self._known(trial)) is None:
            return []
        stamps = {point.timestamp for (key, _), point in run.points.items() if key in METRICS}
        return [stamp / 1000 for stamp in sorted({run.started, *stamps})]

    def _require_parent(self) -> str:
        assert self._parent is not None, "open_parent comes first"
        return self._parent

    def _search(self, condition: str) -> list[Run]:
        return list(self.client.search_runs([self._experiment_id], condition))

    def _child(self, trial: str) -> Run | None:
        """The run that a trial of the study has."""
        return next(iter(self._children(f"tags.trial = '{trial}'")), None)

    def _children(self, condition: str = "tags.kind = 'trial'") -> list[Run]:
        """Runs of the study's trials: those with its identity, else (of older releases) those below the parent run."""
        if self._parent is None:
            return []
        ways = (("study_id", self._identity), (MLFLOW_PARENT_RUN_ID, self._parent))
        found = (self._search(f"tags.`{key}` = '{value}' AND {condition}") for key, value in ways if value)
        return next(filter(None, found), [])

    def _start(self, run: Run, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        self.client.log_batch(
            run.info.run_id, params=new, tags=_run_tags({**tags, "state": "RUNNING"}), synchronous=True
        )

    def _end(self, run_id: str, state: RunState, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=_run_tags({**tags, "state": state}), synchronous=True)
        start = self.client.get_run(run_id).info.start_time
        self.client.set_terminated(run_id, RUN_STATUS[state], max(start, timestamp()))  # a clock may go back

    def _flush(self, run: TrialRun) -> None:
        for start in range(0, len(run.buffer), MAX_METRICS_PER_BATCH):
            batch = run.buffer[start : start + MAX_METRICS_PER_BATCH]
            self.client.log_batch(run.run_id, metrics=batch, synchronous=True)
        run.buffer.clear()

    def _known(self, trial: str) -> TrialRun | None:
        """A trial's run, read from the store where an earlier process wrote it."""
        if trial not in self._trials and (run := self._child(trial)) is not None:
            self._trials[trial] = TrialRun(run.info.run_id, run.info.start_time, points_of(self.client, run))
        return self._trials.get(trial)


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def newest_parent(client: MlflowClient, sweep: str) -> Run | None:
    """The parent run of a sweep's last study; None where the sweep has never run.

    By number, since a clock may go back. Older releases gave none: their runs come before, by time.

    Raises:
        StorageError: its MLflow experiment was deleted.
    """
    experiment = client.get_experiment_by_name(sweep)
    if experiment is None:
        return None
    require_active(client, experiment)
    found = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'")
    return max(found, key=lambda run: (_number(run), run.info.start_time), default=None)


def _number(run: Run) -> int:
    return int(run.data.tags.get(NUMBER, 0))


def read_curve(client: MlflowClient, run_id: str, trial: str) -> pd.DataFrame:
    """Points of a trial's run, as `curve_of` gives them; none where the run is gone."""
    run = find_run(client, run_id)
    return curve_of(points_of(client, run) if run else {}, trial)
