"""Data sets as MLflow knows them: rows described, never stored."""

import json
from collections.abc import Mapping
from typing import Any, Final

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

MAX_DIGEST_LENGTH: Final = 36  # MLflow's limit
SCHEMA: Final = json.dumps(
    {
        "mlflow_colspec": [
            {"type": "string", "name": "text", "required": True},
            {"type": "long", "name": "label", "required": True},
        ]
    }
)


def dataset_input(
    name: str, digest: str, *, num_rows: int, profile: Mapping[str, Any], source: str, context: str
) -> DatasetInput:
    """A data set as input of a run.

    digest: ours, of all rows, cut to MLflow's length (MLflow's own samples rows). profile: numbers to show beside
    `num_rows`. source: where the rows come from, in words. context: what they are for (`training`, `validation`).
    """
    dataset = Dataset(
        name=name,
        digest=digest[:MAX_DIGEST_LENGTH],
        source_type="code",
        source=json.dumps({"tags": {"source": source}}),
        schema=SCHEMA,
        profile=json.dumps({"num_rows": num_rows, **profile}),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
