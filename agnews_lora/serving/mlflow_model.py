"""The registered model as MLflow runs it: a model from code, copied into every version and executed there.

Input: a list of texts, one text, `{"text": [...]}`, a list of records with a key `text`, a series, or a frame with a
column `text`. Output: a frame with the index of the input, a column `label`, and a column of the probability of each
label.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

COLUMN = "text"


class TextClassifier(PythonModel):
    """Label texts with a registered adapter, which `model_config={"merged": True}` merges into the base's weights.

    The base is found by `model_config["base"]`; one inside the project, where the project was moved, beside the model.
    Where it has moved elsewhere, `mlflow.pyfunc.load_model` takes another one: `model_config={"base": ...}`. MLflow
    does not hand over the version's tags, so the hashes of the files are in `model_config` as well.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from agnews_lora.adapters.base_models import resolve
        from agnews_lora.errors import RegistryError
        from agnews_lora.serving.model_package import hashes
        from agnews_lora.serving.predict import Classifier

        artifacts = {name: Path(path) for name, path in context.artifacts.items()}
        if hashes(artifacts) != context.model_config["sha256"]:
            raise RegistryError(
                "Cannot load the model: its files changed since it was registered. Put them back, or serve another."
            )
        base = resolve(_base(context.model_config, artifacts["adapter"]))
        merged = context.model_config["merged"]
        self.classifier = Classifier(artifacts["adapter"], artifacts["tokenizer"], base, merged)

    # Declared as a frame: of any other type that is no list MLflow warns at each load, and a list it would enforce.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        from agnews_lora.errors import DataError
        from agnews_lora.serving.predict import columns

        texts = _texts(model_input)
        for row, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"Cannot label row {row!r}: it is {text!r}, not a text. Leave it out.")
        rows = [each.row() for each in self.classifier.predict(texts.tolist())]
        return pd.DataFrame(rows, index=texts.index, columns=columns(self.classifier.labels))


def _base(config: Mapping[str, Any], model: Path) -> str:
    """Name or folder of the base. model: a folder inside the model's."""
    name, inside = str(config["base"]), config.get("base_in_project")
    places = [folder / inside for folder in model.parents] if inside and not Path(name).exists() else []
    return next((str(place) for place in places if place.is_dir()), name)


def _texts(given: Any) -> "pd.Series[Any]":
    """The texts in any of the forms above, under their index.

    Raises:
        DataError: there is no `text` in it.
    """
    from agnews_lora.errors import DataError

    if isinstance(given, list):  # records hold arrays without axes where MLflow's server has read them
        given = [np.asarray(each.get(COLUMN))[()] if isinstance(each, Mapping) else each for each in given]
    if isinstance(given, Mapping | pd.DataFrame):
        if COLUMN not in given:
            found = ", ".join(map(repr, [*given][:10])) or "nothing"
            raise DataError(f"Cannot label this input: it has no `{COLUMN}`, but {found}. Rename the texts' column.")
        given = given[COLUMN]
    if isinstance(given, pd.Series):
        return given
    return pd.Series(np.asarray([given] if isinstance(given, str) else given, dtype=object).ravel(), dtype=object)


set_model(TextClassifier())
