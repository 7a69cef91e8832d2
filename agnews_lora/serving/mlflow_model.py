"""The registered model as MLflow runs it: a model from code, copied into every version and executed there.

Input: a column `text`. Output: a column `label`, and the probability of each label in a column of its name.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class NewsClassifier(PythonModel):
    """Label texts with a registered adapter, which `model_config={"merged": True}` merges into the base's weights.

    The base is found by `model_config["base"]`. Where it has moved, `mlflow.pyfunc.load_model` takes another one:
    `model_config={"base": ...}`. MLflow does not hand over the version's tags, so the hashes of the files are in
    `model_config` as well.
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
        base = resolve(context.model_config["base"])
        merged = context.model_config["merged"]
        self.classifier = Classifier(artifacts["adapter"], artifacts["tokenizer"], base, merged)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        predictions = self.classifier.predict(model_input["text"].tolist())
        return pd.DataFrame([{"label": each.label, **each.probabilities} for each in predictions])


set_model(NewsClassifier())
