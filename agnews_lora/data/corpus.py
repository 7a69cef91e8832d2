"""What a sweep trains and validates on: rows, split by seed and tokenised. Only `prepare_test` reads the test split."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from agnews_lora.data.sources import DataSettings, best_accuracy, load_test, load_train
from agnews_lora.data.splits import LABELS, Rows, stratified_split, stratified_subset
from agnews_lora.data.tokens import TokenTable, tokenise
from agnews_lora.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, as texts and as token tables (same rows, same order).

    monitor: ids into the validation rows, the fixed stratified subset for evaluations on the way. digest: SHA-256 (hex)
    over the training and the validation rows, order included. best_accuracy: the best that any classifier can reach,
    where that is known.
    """

    train: TokenTable
    validation: TokenTable
    monitor: tuple[int, ...]
    digest: str
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
    rows = load_train(settings, seed)
    train_ids, validation_ids = stratified_split(rows.labels, round(len(rows) * settings.validation), seed)
    validation_rows = rows.take(validation_ids)
    train_rows = rows.take(train_ids)
    if settings.train_rows is not None:
        train_rows = train_rows.take(stratified_subset(train_rows.labels, settings.train_rows, seed))
    _require_every_class("training", train_rows)
    _require_every_class("validation", validation_rows)
    return Corpus(
        train=tokenise(train_rows, tokenizer_folder, max_length, cache),
        validation=tokenise(validation_rows, tokenizer_folder, max_length, cache),
        monitor=tuple(stratified_subset(validation_rows.labels, eval_rows, seed)),
        digest=hashlib.sha256(f"{train_rows.digest()} {validation_rows.digest()}".encode()).hexdigest(),
        train_rows=train_rows,
        validation_rows=validation_rows,
        best_accuracy=best_accuracy(settings),
    )


def prepare_test(
    settings: DataSettings, seed: int, tokenizer_folder: Path, max_length: int, cache: Path
) -> tuple[Rows, TokenTable]:
    """The rows of the test split and their token table; raises as `prepare` does."""
    rows = load_test(settings, seed)
    _require_every_class("test", rows)
    return rows, tokenise(rows, tokenizer_folder, max_length, cache)


def _require_every_class(split: str, rows: Rows) -> None:
    missing = [name for label, name in enumerate(LABELS) if label not in rows.labels]
    if missing:
        raise DataError(
            f"the {split} split needs rows of every class, but of its {len(rows)} rows none is {' or '.join(missing)}; "
            "use more rows"
        )
