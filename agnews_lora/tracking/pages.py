"""What people see of a run in MLflow's UI: its description, its tables, its files and its tags."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

MAX_DESCRIPTION: Final = 8000  # characters: MLflow's limit of a tag


def description(markdown: str) -> dict[str, str]:
    """The tag that is a run's description. What is beyond MLflow's length is cut off at the end of a line."""
    if len(markdown) > MAX_DESCRIPTION:
        markdown = markdown[:MAX_DESCRIPTION].rpartition("\n")[0]
    return {MLFLOW_RUN_NOTE: markdown}


def page_of(client: MlflowClient, run_id: str) -> "RunPage":
    """The page of a run, wherever it is in the store."""
    return RunPage(client, client.get_run(run_id).info.experiment_id, run_id)


def newest_sweeps(client: MlflowClient) -> dict[str, "RunPage"]:
    """The page of the newest parent run of every sweep, by the study's name."""
    found: dict[str, RunPage] = {}
    for experiment in client.search_experiments():
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'", max_results=1, order_by=order)
        found |= {str(run.info.run_name): RunPage(client, experiment.experiment_id, run.info.run_id) for run in runs}
    return found


class RunPage:
    """One run's page. Writing anything twice leaves it as if it was written once, but for a metric's time."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self.experiment_id = experiment_id

    def parent(self) -> "RunPage | None":
        """The page of the run above this one, where there is one."""
        above = self._client.get_run(self.run_id).data.tags.get(MLFLOW_PARENT_RUN_ID)
        return RunPage(self._client, self.experiment_id, above) if above else None

    def describe(self, markdown: str) -> None:
        """Replace the description."""
        self.set_tags(description(markdown))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, all at once."""
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log single values of the whole run."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self.run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Save a table as `<name>.csv`, and as `<name>.json`, which the UI shows as a table."""
        self._client.log_text(self.run_id, table.to_csv(index=False), f"{name}.csv")
        # `MlflowClient.log_table` would append to the rows of an earlier session.
        self._client.log_text(self.run_id, table.to_json(orient="split", index=False), f"{name}.json")
        entry = {"path": f"{name}.json", "type": "table"}
        listed = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if entry not in listed:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save files under their artifact names, which may have folders."""
        with tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                there = Path(folder, name)
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, there)
            self._client.log_artifacts(self.run_id, folder)

    def read_text(self, name: str) -> str | None:
        """Content of a text artifact at the top of the run, or None where it has none of that name."""
        if all(item.path != name for item in self._client.list_artifacts(self.run_id)):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(self.run_id, name, folder)).read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """Of the page, relative to the UI that shows a description."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def children_url(self) -> str:
        """Of the runs below this one as charts, best accuracy first."""
        query = {
            "searchFilter": f"tags.mlflow.parentRunId = '{self.run_id}'",
            "orderByKey": "metrics.`eval/accuracy`",
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return f"#/experiments/{self.experiment_id}/runs?{urlencode(query, quote_via=quote)}"

    def artifact_url(self, name: str) -> str:
        """Of the page that shows an artifact."""
        return f"{self.url}/artifacts/{quote(name)}"

    def image_url(self, name: str) -> str:
        """Of an artifact's bytes, for a picture in a description."""
        return f"get-artifact?path={quote(name, safe='')}&run_uuid={self.run_id}"
