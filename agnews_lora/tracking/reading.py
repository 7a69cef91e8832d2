"""Runs as they are read back: plain values, with nothing of MLflow in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from agnews_lora.tracking.runs import METRICS

PAGE = 1000  # runs that are asked for at once


@dataclass(frozen=True)
class DatasetUse:
    """A data set that a run used. context: what for (`training`, `validation`). digest: of its rows, cut."""

    name: str
    context: str
    digest: str
    num_rows: int


@dataclass(frozen=True)
class RunRecord:
    """A run as it is in the store. metrics: the last value of each. began, ended: ms since 1970."""

    run_id: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    datasets: tuple[DatasetUse, ...]
    began: int
    ended: int | None


def newest_sweep(client: MlflowClient, sweep: str) -> RunRecord | None:
    """The parent run of a sweep that was begun last; None where the sweep has never run."""
    experiment = client.get_experiment_by_name(sweep)
    if experiment is None:
        return None
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'", max_results=1, order_by=order)
    return _record(found[0]) if found else None


def read_run(client: MlflowClient, run_id: str) -> RunRecord | None:
    """A run by its id, or None where it is gone."""
    try:
        return _record(client.get_run(run_id))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def trials_of(client: MlflowClient, parent: str) -> list[RunRecord]:
    """The runs of a sweep's trials, those that confirm others among them, in the order they were begun."""
    experiment = client.get_run(parent).info.experiment_id
    query, order = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'", ["attributes.start_time ASC"]
    page = client.search_runs([experiment], query, max_results=PAGE, order_by=order)
    found = list(page)
    while page.token:
        page = client.search_runs([experiment], query, max_results=PAGE, order_by=order, page_token=page.token)
        found += page
    return [_record(run) for run in found]


def curve(client: MlflowClient, run: RunRecord, trial: str) -> pd.DataFrame:
    """Points of a trial: one row a step, in the columns of `SweepRuns.curve`."""
    names = [name for name in METRICS if name in run.metrics]
    points = {
        (metric.key, metric.step): metric.value
        for name in names
        for metric in client.get_metric_history(run.run_id, name)
    }
    steps = sorted({step for _, step in points})
    columns = {name: [points.get((name, step), float("nan")) for step in steps] for name in METRICS}
    return pd.DataFrame({"trial": [trial] * len(steps), "step": steps, **columns})


def fetch(client: MlflowClient, run_id: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Those of a run's artifacts that are there, by name. names: paths in the run.

    They are downloaded into the folder, or where the store is local, lie in the store itself: they are to be read only.
    """
    listed: dict[str, set[str]] = {}
    found: dict[str, Path] = {}
    for name in names:
        parent = name.rpartition("/")[0]
        if parent not in listed:
            listed[parent] = {item.path for item in client.list_artifacts(run_id, parent or None)}
        if name in listed[parent]:
            folder.mkdir(parents=True, exist_ok=True)
            found[name] = Path(client.download_artifacts(run_id, name, str(folder)))
    return found


def _record(run: Run) -> RunRecord:
    uses = tuple(
        DatasetUse(
            name=used.dataset.name,
            context=next((tag.value for tag in used.tags if tag.key == MLFLOW_DATASET_CONTEXT), ""),
            digest=used.dataset.digest,
            num_rows=int(json.loads(used.dataset.profile or "{}").get("num_rows", 0)),
        )
        for used in (run.inputs.dataset_inputs if run.inputs else [])
    )
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        datasets=uses,
        began=run.info.start_time,
        ended=run.info.end_time,
    )
