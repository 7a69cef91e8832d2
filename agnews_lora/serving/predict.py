"""Labels and probabilities for texts."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.adapter_files import load_with_peft, read_record
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.data.cleaning import clean
from agnews_lora.data.tokens import TokenTable, load_tokenizer
from agnews_lora.errors import DataError, RegistryError
from agnews_lora.serving.package import Package
from agnews_lora.serving.reload import full_precision
from agnews_lora.training.device import training_device
from agnews_lora.training.metrics import predict_logits

if TYPE_CHECKING:
    from agnews_lora.tracking.registry import Registry, Version

BATCH_SIZE: Final = 32


@dataclass(frozen=True)
class Prediction:
    """label: the most probable one. probabilities: of every label, by name; they sum to 1."""

    label: str
    probabilities: dict[str, float]


class Classifier:
    """An adapter on its base, with the tokenizer it was trained with: fp32, on CUDA where there is one.

    adapter: folder with PEFT's files and the adapter's record. tokenizer: folder with the tokenizer's files. merged:
    the adapter's products are added to the base's weights (W + alpha/r·BA, and the head in the base's place), so that
    it computes what the base alone would; its logits differ by rounding.

    Threads may share it; they take turns.

    Raises:
        AdapterError: the files are not an adapter, or not one of this base.
        BaseModelError: the tokenizer cannot be read.
    """

    def __init__(self, adapter: Path, tokenizer: Path, base: BaseModel, merged: bool = False) -> None:
        record = read_record(adapter)
        self.labels = record.labels
        self._max_length = record.max_length
        self._tokenizer = load_tokenizer(tokenizer)
        self._device = training_device()
        model = load_with_peft(adapter, base)
        self._model = (model.merge_and_unload() if merged else model).to(self._device)
        # The tokenizer is set up by its first call, the precision is the whole process's: not for two threads at once.
        self._turn = threading.Lock()

    def predict(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """One prediction a text, in order. Texts are cleaned as those it was trained on.

        Raises:
            DataError: a text in which nothing is left after cleaning, named by its index (from 0).
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
        with self._turn, full_precision():
            return predict_logits(self._model, table, range(len(table)), batch_size, self._device)

    def _tokenise(self, texts: Sequence[str]) -> TokenTable:
        cleaned = cleaned_texts(texts)
        with self._turn:
            ids = self._tokenizer(cleaned, truncation=True, max_length=self._max_length)["input_ids"]
        return TokenTable(
            ids=np.concatenate([np.asarray(row, dtype=np.int32) for row in ids]),
            offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
            labels=np.zeros(len(ids), dtype=np.int64),  # unknown, and not read
            pad_id=self._tokenizer.pad_token_id,
            digest="",
        )


def cleaned_texts(texts: Sequence[str]) -> list[str]:
    """The texts as the model reads them, cleaned like those it was trained on.

    Raises:
        DataError: texts of which nothing that shows is left, named by their indices (from 0).
    """
    cleaned = [clean(text) for text in texts]
    empty = [str(index) for index, text in enumerate(cleaned) if not _shows(text)]
    if empty:
        raise DataError(
            f"a text must hold some words, but nothing is left of text {', '.join(empty)} (counted from 0) after "
            "cleaning; leave it out"
        )
    return cleaned


def _shows(text: str) -> bool:
    """Whether there is anything to read: neither spaces nor control or other invisible characters."""
    return any(character.isprintable() and not character.isspace() for character in text)


def load_champion(registry: "Registry") -> Classifier:
    """The champion, ready to predict.

    Raises:
        RegistryError: there is none, or its files are no longer those that were registered.
        BaseModelError: its base is not where it was.
    """
    version = champion(registry)
    package = verified_package(registry, version)
    return Classifier(package.adapter, package.tokenizer, resolve(version.tags["base"]))


def champion(registry: "Registry") -> "Version":
    """The version in use.

    Raises:
        RegistryError: there is none.
    """
    from agnews_lora.tracking.registry import CHAMPION

    version = registry.aliased(CHAMPION)
    if version is None:
        raise RegistryError(
            f"a champion of {registry.model} is needed, but there is none; `agnews-lora sweep SWEEP` registers a "
            "candidate, and `agnews-lora promote SWEEP` makes it champion if it passes the gate"
        )
    return version


def verified_package(registry: "Registry", version: "Version") -> Package:
    """A version's files, which are still those that were registered.

    Raises:
        RegistryError: files that were changed, removed or added since.
    """
    package = Package(registry.folder(version))
    changed = package.changed(version.tags)
    if changed:
        raise RegistryError(
            f"the files of {version} must be those that were registered, but {', '.join(changed)} changed since; put "
            "them back, or go back with `agnews-lora promote SWEEP --rollback`"
        )
    return package
