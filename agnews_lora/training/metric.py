"""Accuracy and macro-F1 as an `evaluate.Metric` that comes with the package, so that no hub is asked for it."""

from typing import Any

import datasets
import evaluate
import numpy as np

from agnews_lora.training.evaluation import accuracy, macro_f1


class AccuracyAndMacroF1(evaluate.Metric):
    """`compute(predictions=[…], references=[…])` gives `{"accuracy", "macro_f1"}` of class ids."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and unweighted mean F1 over the classes.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), np.asarray(references)
        return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}
