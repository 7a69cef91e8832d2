"""Pages of MLflow's UI: their addresses, and the shared view in which the UI shows the trials of a study.

A shared view is a tag of the MLflow experiment, whose value is the state of the UI as JSON: filter, order, columns and
charts. A link with its key opens it. Every study has its own view.
"""

import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from agnews_lora.training.interface import SCORES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

UI: Final = "http://127.0.0.1:5000"  # of `agnews-lora ui`, unless it is told otherwise
LAYOUT: Final = "machine_learning"  # of the UI, which else shows what language-model applications need
VIEW: Final = "sweep"  # key of the first study's view, and stem of the next ones'
NUMBER: Final = "number"  # tag of a parent run: the sweep's first, second, … study
TAG: Final = "mlflow.sharedViewState."  # before a view's key
PARAMS: Final = ("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "trainable_parameters")
# In pixels: all columns fit a window of 1,440, and those before the parameters fit beside the UI's assistant, too.
WIDTHS: Final = {
    "attributes.`Run Name`": 160,
    "runDateAndNestInfo": 125,
    "tags.`state`": 90,
    "metrics.`eval/accuracy`": 105,
    "metrics.`eval/macro_f1`": 105,
    "params.`targets`": 85,
    "params.`lora_r`": 60,
    "params.`lora_alpha`": 85,
    "params.`lora_dropout`": 100,
    "params.`learning_rate`": 105,
    "params.`trainable_parameters`": 155,
}


def address(path: str, **query: str) -> str:
    """Of a page of the UI, relative to the page that links to it."""
    return f"#/{path}?{urlencode({'workflowType': LAYOUT, **query}, quote_via=quote)}"


def share_view(client: "MlflowClient", parent: "Run", objective: str) -> dict[str, str]:
    """Write the view of a study, and return the addresses of the pages that show the study.

    Args:
        parent: the study's parent run.

    Returns:
        `sweep` (the parent run), `trials` (as a table) and `charts`.
    """
    number = int(parent.data.tags.get(NUMBER, 1))
    key = VIEW if number == 1 else f"{VIEW}-{number}"
    run_id, experiment = parent.info.run_id, f"experiments/{parent.info.experiment_id}"
    client.set_experiment_tag(parent.info.experiment_id, TAG + key, json.dumps(view_state(run_id, objective)))
    return {
        "sweep": address(f"{experiment}/runs/{run_id}"),
        "trials": address(f"{experiment}/runs", viewStateShareKey=key),
        "charts": address(f"{experiment}/runs", viewStateShareKey=key, compareRunsMode="CHART"),
    }


def view_state(run_id: str, objective: str) -> dict[str, Any]:
    """What the UI shows of the trials below a parent run, without their repetitions: the best first."""
    score = f"eval/{objective}"
    columns = [
        "tags.`state`",
        *(f"metrics.`eval/{name}`" for name in SCORES if name in ("accuracy", objective)),
        *(f"params.`{name}`" for name in PARAMS),
    ]
    shown = ["attributes.`Run Name`", "runDateAndNestInfo", *columns]
    chart = {"metricSectionId": VIEW, "runsCountToCompare": 1000}
    return {
        "searchFilter": f"tags.mlflow.parentRunId = '{run_id}' AND tags.confirms IS NULL",
        "orderByKey": f"metrics.`{score}`",
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": shown,
        "columnWidths": {column: WIDTHS[column] for column in shown},
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,  # beside the charts, which need the width
        "isAccordionReordered": True,  # else the UI puts its own sections before this one
        "compareRunSections": [{"uuid": VIEW, "name": "Sweep", "display": True, "columns": 1, "cardHeight": 262}],
        "compareRunCharts": [
            {
                **chart,
                "uuid": "coordinates",
                "type": "PARALLEL",
                "showAllRuns": True,
                "selectedParams": PARAMS,
                "selectedMetrics": [score],
            },
            {
                **chart,
                "uuid": "size",
                "type": "SCATTER",
                "xaxis": {"key": "trainable_parameters", "type": "PARAM"},
                "yaxis": {"key": score, "type": "METRIC"},
            },
        ],
    }
