"""The data of a sweep: rows of the hub, of CSV files or of newswire, split by seed and tokenised.

Hub and CSV give the same texts for the same rows: title and description, cleaned by `cleaning.clean`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from agnews_lora import hub
from agnews_lora.data import newswire
from agnews_lora.data.cleaning import clean
from agnews_lora.data.rows import Rows, read_csv, require_file, stratified_split, stratified_subset
from agnews_lora.data.tokens import TokenTable, tokenise
from agnews_lora.errors import DataError

HUB_DATASET: Final = "fancyzhx/ag_news"
HUB_REVISION: Final = "eb185aade064a813bc0b7f42de02595523103ca4"
_HUB_REMEDY: Final = (
    "Take `experiment: embedded` (its base and corpus need no hub), or `source: csv` with the AG News files in a local "
    "directory."
)

Split = Literal["train", "test"]


@dataclass(frozen=True)
class DataSettings:
    """The data settings of an experiment.

    Args:
        train, test: CSV files, relative to the working directory (csv).
        rows: rows of the train split to use at all, stratified by seed (newswire: to generate; None: all).
        train_rows: most training rows to keep after the validation split, stratified by seed (None: all).
        test_rows: rows of the test split, as `rows`.
        validation: share of the rows for validation.
    """

    source: Literal["hub", "csv", "newswire"]
    train: str | None = None
    test: str | None = None
    rows: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    validation: float = 0.1


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, as texts and as token tables (same rows, same order).

    Args:
        monitor: ids into the validation rows, the fixed stratified subset for evaluations on the way.
        digest: SHA-256 (hex) over the training and the validation rows, order included.
        labels: names of the classes, by class id.
        best_accuracy: the best that any classifier can reach, where that is known.
    """

    train: TokenTable
    validation: TokenTable
    monitor: tuple[int, ...]
    digest: str
    labels: tuple[str, ...]
    train_rows: Rows
    validation_rows: Rows
    best_accuracy: float | None


def prepare(
    settings: DataSettings, seed: int, tokenizer_folder: Path, max_length: int, eval_rows: int, cache: Path
) -> Corpus:
    """The corpus of an experiment: rows loaded, split, capped and tokenised, the same for the same arguments.

    Raises:
        DataError: rows missing or malformed, or a split in which a class has no row.
        NetworkError, BaseModelError, StorageError: as the sources, the tokenizer and the cache do.
    """
    rows = load(settings, "train", seed)
    train_ids, validation_ids = stratified_split(rows.labels, round(len(rows) * settings.validation), seed)
    validation_rows = rows.take(validation_ids)
    train_rows = rows.take(train_ids)
    if settings.train_rows is not None:
        train_rows = train_rows.take(stratified_subset(train_rows.labels, settings.train_rows, seed))
    labels = label_names(settings)
    _require_every_class("training", train_rows, labels)
    _require_every_class("validation", validation_rows, labels)
    return Corpus(
        train=tokenise(train_rows, tokenizer_folder, max_length, cache),
        validation=tokenise(validation_rows, tokenizer_folder, max_length, cache),
        monitor=tuple(stratified_subset(validation_rows.labels, eval_rows, seed)),
        digest=hashlib.sha256(f"{train_rows.digest()} {validation_rows.digest()}".encode()).hexdigest(),
        labels=labels,
        train_rows=train_rows,
        validation_rows=validation_rows,
        best_accuracy=newswire.BEST_ACCURACY if settings.source == "newswire" else None,
    )


def prepare_test(
    settings: DataSettings, seed: int, tokenizer_folder: Path, max_length: int, cache: Path
) -> tuple[Rows, TokenTable]:
    """The rows of the test split and their token table; raises as `prepare` does."""
    rows = load(settings, "test", seed)
    _require_every_class("test", rows, label_names(settings))
    return rows, tokenise(rows, tokenizer_folder, max_length, cache)


def label_names(settings: DataSettings) -> tuple[str, ...]:
    """Names of the classes, by class id."""
    return newswire.LABELS


def load(settings: DataSettings, split: Split, seed: int) -> Rows:
    """The rows of the train split (to train and validate on), or of the test split.

    Raises:
        DataError: rows that are missing or malformed.
        NetworkError: the hub is needed and cannot be reached.
        StorageError: a download cannot be stored.
    """
    num_rows = settings.rows if split == "train" else settings.test_rows
    if settings.source == "newswire":
        assert num_rows is not None, "an experiment says how many rows newswire generates"
        return newswire.generate(num_rows, split, seed)
    rows = read_csv(_csv_path(settings, split)) if settings.source == "csv" else _load_hub(split)
    return rows if num_rows is None else rows.take(stratified_subset(rows.labels, num_rows, seed))


def check(settings: DataSettings) -> None:
    """Check within seconds that both splits can be had: no row is read and nothing is downloaded.

    Raises:
        DataError: a file that is not there or not readable.
        NetworkError: the hub is needed and cannot be reached.
    """
    if settings.source == "csv":
        for split in ("train", "test"):
            try:
                require_file(_csv_path(settings, split))
            except DataError as error:
                raise DataError(f"data.{split}: {error}") from error
    elif settings.source == "hub" and any(_cached_arrow(split) is None for split in ("train", "test")):
        hub.require_reachable(f"data set {HUB_DATASET}", _HUB_REMEDY)


def describe(settings: DataSettings) -> dict[str, str]:
    """Provenance for runs and cards: the source and what pins it; file names without their folders."""
    if settings.source == "hub":
        return {"source": "hub", "dataset": HUB_DATASET, "revision": HUB_REVISION}
    if settings.source == "csv":
        return {"source": "csv", **{split: _csv_path(settings, split).name for split in ("train", "test")}}
    return {"source": "newswire", "rows": str(settings.rows), "test_rows": str(settings.test_rows)}


def _csv_path(settings: DataSettings, split: Split) -> Path:
    name = settings.train if split == "train" else settings.test
    assert name is not None, "an experiment names both CSV files"
    return Path(name)


def _load_hub(split: Split) -> Rows:
    """A split of the published data set: from the local cache where it is there, else downloaded."""
    import datasets

    cached = _cached_arrow(split)
    if cached is not None:
        table = datasets.Dataset.from_file(str(cached))
    else:
        with hub.downloading(f"data set {HUB_DATASET}", _HUB_REMEDY):
            table = datasets.load_dataset(HUB_DATASET, revision=HUB_REVISION, split=split)
    return Rows(tuple(map(clean, table["text"])), tuple(table["label"]))


def _cached_arrow(split: Split) -> Path | None:
    """The pinned revision's file in the cache of `datasets`: <owner>___<name>/<config>/<version>/<revision>/…"""
    from datasets import config

    owner, name = HUB_DATASET.split("/")
    root = Path(config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{name}"
    return next(root.glob(f"*/*/{HUB_REVISION}/{name}-{split}.arrow"), None)


def _require_every_class(split: str, rows: Rows, labels: Sequence[str]) -> None:
    missing = [name for label, name in enumerate(labels) if label not in rows.labels]
    if missing:
        raise DataError(
            f"Cannot use the {split} split: none of its {len(rows)} rows is {' or '.join(missing)}. Use more rows."
        )
