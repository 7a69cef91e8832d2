"""Labels and probabilities for texts."""

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.adapter_files import load_with_peft, read_record
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.data.rows import Rows, TextFault, usable_text
from agnews_lora.data.tokens import TokenTable, encode, load_tokenizer
from agnews_lora.errors import DataError
from agnews_lora.serving.model_package import Package
from agnews_lora.serving.reload import full_precision
from agnews_lora.training.device import training_device
from agnews_lora.training.metrics import predict_logits

BATCH_SIZE: Final = 32
_REPORTED: Final = 5  # texts named in one message


@dataclass(frozen=True)
class Prediction:
    """label: the most probable one. probabilities: of every label, by name; they sum to 1."""

    label: str
    probabilities: dict[str, float]

    def row(self) -> dict[str, str | float]:
        """Label and probabilities as one record, under the names of `columns`."""
        return {free_name("label", self.probabilities): self.label, **self.probabilities}


def columns(labels: Sequence[str]) -> list[str]:
    """Names of a table of predictions: `label`, then the labels themselves."""
    return [free_name("label", labels), *labels]


def free_name(name: str, labels: Container[str]) -> str:
    """The name of a column beside those of the labels: with an underscore behind it where a label is called so."""
    while name in labels:
        name += "_"
    return name


class Classifier:
    """An adapter on its base, with the tokenizer it was trained with: fp32, on CUDA where there is one.

    Threads may share it. Where the process allows TF32, they hold `full_precision` around their calls.

    Args:
        adapter: folder with PEFT's files and the adapter's record.
        tokenizer: folder with the tokenizer's files.
        merged: add the adapter's products to the base's weights (W + alpha/r·BA, and the head in the base's place), so
            that prediction costs no more than the base alone; the logits differ by rounding.

    Raises:
        AdapterError: the files are not an adapter, or not one of this base.
        BaseModelError: the tokenizer cannot be read.
    """

    @classmethod
    def load(cls, package: Package, merged: bool = False) -> Self:
        """A registered model, ready to predict.

        Raises:
            BaseModelError: the base is not where it was.
        """
        return cls(package.adapter, package.tokenizer, resolve(package.version.tags["base"]), merged)

    def __init__(self, adapter: Path, tokenizer: Path, base: BaseModel, merged: bool = False) -> None:
        self.record = read_record(adapter)
        self.labels = self.record.labels
        self._tokenizer = load_tokenizer(tokenizer)
        self._device = training_device()
        model = load_with_peft(adapter, base)
        self._model = (model.merge_and_unload() if merged else model).to(self._device)
        # The tokenizer is set up anew by its calls: not for two threads at once.
        self._turn = threading.Lock()

    def predict(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """One prediction a text, in order. Texts are cleaned as those it was trained on.

        Raises:
            DataError: texts that cannot be used, named by their index (from 0); see `usable_text`.
        """
        if not texts:
            return []
        logits = self.logits(self._tokenise(texts), batch_size)
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return [
            Prediction(self.labels[int(row.argmax())], dict(zip(self.labels, row.tolist(), strict=True)))
            for row in probabilities
        ]

    def logits(self, table: TokenTable, batch_size: int = BATCH_SIZE) -> npt.NDArray[np.float32]:
        """Logits [rows, classes] on all rows of a table that this tokenizer made."""
        with full_precision():
            return predict_logits(self._model, table, range(len(table)), batch_size, self._device)

    def _tokenise(self, texts: Sequence[str]) -> TokenTable:
        usable: list[str] = []
        faults: list[str] = []
        for index, text in enumerate(texts):
            try:
                usable.append(usable_text(text, self.record.clean))
            except TextFault as fault:
                faults.append(f"text {index} {fault}")
        if faults:
            named = "; ".join(faults[:_REPORTED]) + (
                f"; and {len(faults) - _REPORTED} more" * (len(faults) > _REPORTED)
            )
            raise DataError(f"Cannot label these texts (counted from 0): {named}. Leave them out, or cut them.")
        rows = Rows(tuple(usable), (0,) * len(usable))  # the labels are unknown, and not read
        with self._turn:
            return encode(rows, self._tokenizer, self.record.max_length)
