"""The data of a sweep: rows of files, of the hub or of newswire, split by seed and tokenised."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from agnews_lora import hub
from agnews_lora.data import newswire
from agnews_lora.data import profile as profiles
from agnews_lora.data.files import Table, class_ids, label_values, read_file, read_split, require_file, rows_of
from agnews_lora.data.rows import Rows, stratified_split, stratified_subset
from agnews_lora.data.tokens import TokenTable, tokenise
from agnews_lora.errors import DataError
from agnews_lora.paths import sha256_of

SPLITS: Final = ("train", "validation", "test")
_HUB_REMEDY: Final = (
    "Without the hub, take `source: files` with the rows in local files, or the experiment `embedded`, whose base and "
    "rows are local."
)


@dataclass(frozen=True)
class DataSettings:
    """The data settings of an experiment.

    Args:
        train: a file, relative to the working directory (files), or the name of a split (hub).
        test, validation: as `train`, or the share of the training rows that is held out.
        dataset, config, revision: on the hub.
        text: columns of the text, which are joined by a space. label: column of the label.
        labels: names of the classes in order, or {value in the column: name}; None: the values themselves.
        columns: names of the columns of CSV and TSV files without a header.
        clean: a name in `rows.CLEANING`, or None.
        allow_overlap: whether test rows may be among the others.
        rows: rows to use beside the test rows, stratified by seed (newswire: to generate; None: all).
        train_rows: most training rows to keep after the validation split, stratified by seed (None: all).
        test_rows: rows of the test split, as `rows`.
    """

    source: Literal["files", "hub", "newswire"]
    train: str = ""
    test: str | float = 0.1
    validation: str | float = 0.1
    dataset: str = ""
    config: str | None = None
    revision: str | None = None
    text: tuple[str, ...] = ()
    label: str = ""
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    columns: tuple[str, ...] | None = None
    clean: str | None = None
    allow_overlap: bool = False
    rows: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None


@dataclass(frozen=True)
class Splits:
    """The rows of an experiment. labels: names of the classes, by class id."""

    train: Rows
    validation: Rows
    test: Rows
    labels: tuple[str, ...]

    @property
    def rows(self) -> dict[str, Rows]:
        """By the name of the split."""
        return {name: getattr(self, name) for name in SPLITS}


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, as texts and as token tables (same rows, same order).

    Args:
        monitor: ids into the validation rows, the fixed stratified subset for evaluations on the way.
        digest: SHA-256 (hex) over the labels and the training and the validation rows, order included.
        labels: names of the classes, by class id.
        best_accuracy: the best that any classifier can reach, where that is known.
        clean: how the texts were cleaned, a name in `rows.CLEANING`; None: they stayed as they are.
        profile: what the rows of all splits are like, see `profile.profile`.
    """

    train: TokenTable
    validation: TokenTable
    monitor: tuple[int, ...]
    digest: str
    labels: tuple[str, ...]
    train_rows: Rows
    validation_rows: Rows
    best_accuracy: float | None
    clean: str | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    settings: DataSettings, seed: int, tokenizer_folder: Path, max_length: int, eval_rows: int, cache: Path
) -> Corpus:
    """The corpus of an experiment: rows loaded, split, capped and tokenised, the same for the same arguments.

    The test rows are read as well, and compared with the others, but they are not part of it.

    Raises:
        DataError: rows missing or malformed, a class without training or validation rows, or test rows among the
            others.
        NetworkError, BaseModelError, StorageError: as the sources, the tokenizer and the cache do.
    """
    splits = load(settings, seed)
    require_apart(settings, splits)
    digests = splits.train.digest(), splits.validation.digest(), json.dumps(splits.labels)
    tables = {name: tokenise(splits.rows[name], tokenizer_folder, max_length, cache) for name in SPLITS[:2]}
    return Corpus(
        **tables,
        monitor=tuple(stratified_subset(splits.validation.labels, eval_rows, seed)),
        digest=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        labels=splits.labels,
        train_rows=splits.train,
        validation_rows=splits.validation,
        best_accuracy=newswire.BEST_ACCURACY if settings.source == "newswire" else None,
        clean=settings.clean,
        profile=profiles.profile(splits.rows, splits.labels, tables, max_length),
    )


def prepare_test(
    settings: DataSettings, seed: int, tokenizer_folder: Path, max_length: int, cache: Path
) -> tuple[Rows, TokenTable]:
    """The rows of the test split and their token table; raises as `prepare` does."""
    rows = load(settings, seed).test
    return rows, tokenise(rows, tokenizer_folder, max_length, cache)


def label_names(settings: DataSettings) -> tuple[str, ...]:
    """Names of the classes, by class id: as the settings give them, else from the label column of the training rows.

    Raises:
        DataError, NetworkError, StorageError: as of `load`.
    """
    if settings.source == "newswire":
        return newswire.LABELS
    if settings.labels is not None:
        given = settings.labels
        return tuple(dict.fromkeys(given.values())) if isinstance(given, Mapping) else given
    if settings.source == "files":
        found, declared = label_values(Path(settings.train), settings.label, settings.columns)
    else:
        table = _table(settings, settings.train)
        found, declared = set(table.label_keys), table.declared
    names, ids = class_ids(found, None, declared, settings.label, settings.train)
    if not names:
        rows_of(_table(settings, settings.train), ids, settings.clean)  # names the rows that have no label
    return names


def load(settings: DataSettings, seed: int) -> Splits:
    """The rows of the three splits.

    A share for testing is held out first, whatever the caps, and then one for validation; so the test rows stay the
    same when a cap changes.

    Raises:
        DataError: rows that are missing or malformed, or a class without training or validation rows.
        NetworkError: the hub is needed and cannot be reached.
        StorageError: a download cannot be stored.
    """
    validation: Rows | None = None
    test: Rows | None = None
    if settings.source == "newswire":
        assert settings.rows is not None and settings.test_rows is not None, "an experiment says how many are generated"
        labels: tuple[str, ...] = newswire.LABELS
        train, test = (
            newswire.generate(rows, split, seed)
            for rows, split in ((settings.rows, "train"), (settings.test_rows, "test"))
        )
    else:
        table = _table(settings, settings.train)
        labels, ids = class_ids(table.label_keys, settings.labels, table.declared, settings.label, table.name)
        train = rows_of(table, ids, settings.clean)
        validation, test = (
            rows_of(_table(settings, name), ids, settings.clean) if isinstance(name, str) else None
            for name in (settings.validation, settings.test)
        )
    available = Counter(train.labels)
    if test is None:
        train, test = _hold_out(train, settings.test, seed, keep=1 if validation else 2)
    train, test = _capped(train, settings.rows, seed), _capped(test, settings.test_rows, seed)
    if validation is None:
        train, validation = _hold_out(train, settings.validation, seed, keep=1)
        _require_every_class("validation", validation, labels, available)
    train = _capped(train, settings.train_rows, seed)
    _require_every_class("training", train, labels, available)
    if not len(test):
        raise DataError(
            "Cannot use this data: no class has a third row for testing, beside those for training and validation. Use "
            "more rows, or name a file or split as `test`."
        )
    return Splits(train, validation, test, labels)


def require_apart(settings: DataSettings, splits: Splits) -> None:
    """Check that hardly any row to score on has been trained on, unless the settings accept it.

    Raises:
        DataError: too many have.
    """
    if not settings.allow_overlap:
        profiles.require_apart(splits.rows, [name for name in SPLITS[1:] if isinstance(getattr(settings, name), str)])


def check(settings: DataSettings) -> None:
    """Check within seconds that all splits are available: no row is read and nothing is downloaded.

    Raises:
        DataError: a file that is not there or not readable, or no such data set.
        NetworkError: the hub is needed and cannot be reached.
    """
    if settings.source == "files":
        for split in SPLITS:
            path = getattr(settings, split)
            try:
                if isinstance(path, str):
                    require_file(Path(path))
            except DataError as error:
                raise DataError(f"{error} It is `data.{split}` of the experiment.") from error
            if split != "train" and isinstance(path, str) and Path(path).samefile(settings.train):
                _require_accepted(settings, split, "file")
    elif settings.source == "hub":
        hub.check_dataset(settings.dataset, settings.config, settings.revision, _HUB_REMEDY)
        for split in SPLITS[1:]:
            if getattr(settings, split) == settings.train:
                _require_accepted(settings, split, "split")


def _require_accepted(settings: DataSettings, split: str, kind: str) -> None:
    if not settings.allow_overlap:
        raise DataError(
            f"data.{split}: Cannot score on {getattr(settings, split)}: it is the training {kind}. Leave `{split}` "
            "out, so that a share is held out, or accept it with `allow_overlap: true`."
        )


def describe(settings: DataSettings) -> dict[str, str]:
    """Provenance for runs and cards: the source and what pins it; file names without their folders."""
    if settings.source == "newswire":
        return {"source": "newswire", "rows": str(settings.rows), "test_rows": str(settings.test_rows)}
    found: dict[str, str] = {"source": settings.source}
    if settings.source == "hub":
        what = f"data set {settings.dataset}"
        commit = hub.commit_of("dataset", settings.dataset, settings.revision, what, _HUB_REMEDY, DataError)
        found |= {"dataset": settings.dataset, "config": settings.config or "", "revision": commit}
    for split in SPLITS:
        value = getattr(settings, split)
        found[split] = Path(value).name if isinstance(value, str) else f"{value:.4g} of the training rows"
    return {name: value for name, value in found.items() if value}


def file_hashes(settings: DataSettings) -> dict[str, str]:
    """SHA-256 (hex) of each file that the rows are read from, by split."""
    named = {split: getattr(settings, split) for split in SPLITS if settings.source == "files"}
    return {split: sha256_of(Path(path)) for split, path in named.items() if isinstance(path, str)}


def _table(settings: DataSettings, name: str) -> Table:
    """The rows of a file or of a split of the hub."""
    if settings.source == "files":
        return read_file(Path(name), settings.text, settings.label, settings.columns)
    rows = hub.load_dataset(settings.dataset, settings.config, settings.revision, name, _HUB_REMEDY)
    return read_split(rows, f"{settings.dataset}, split {name}", settings.text, settings.label)


def _hold_out(rows: Rows, share: str | float, seed: int, keep: int) -> tuple[Rows, Rows]:
    """(the rest, the share of each class that is held out).

    A class with more than `keep` rows gives one at least, and every class keeps as many.
    """
    assert isinstance(share, float), "a path is read, not held out"
    giving = sum(count > keep for count in Counter(rows.labels).values())
    rest, held_out = stratified_split(rows.labels, max(round(len(rows) * share), giving), seed, keep)
    return rows.take(rest), rows.take(held_out)


def _capped(rows: Rows, num_rows: int | None, seed: int) -> Rows:
    return rows if num_rows is None else rows.take(stratified_subset(rows.labels, num_rows, seed))


def _require_every_class(split: str, rows: Rows, labels: tuple[str, ...], available: Mapping[int, int]) -> None:
    """Check that no class is missing.

    Args:
        available: rows of each class id in the training file, before anything was held out.

    Raises:
        DataError: one is; says what mends it.
    """
    missing = set(range(len(labels))) - set(rows.labels)
    if not missing:
        return
    label = min(missing, key=lambda label: (available[label], label))
    count, name = available[label], repr(labels[label])
    needed = f"class {name} has {count} row{'' if count == 1 else 's'} in the training data"
    if count == 0:
        remedy = "Name the classes that have rows as `labels:`"
    elif count <= 2 and 2 * len(missing) > len(labels):
        remedy = "Most classes are as rare: name the column of the classes as `label:`"
    elif count <= 2:
        remedy = f"Merge it with another class (`labels: {{…, {labels[label]}: OTHER}}`), or remove its rows"
    else:
        remedy = f"Raise `rows` or `train_rows`: they should be several times the {len(labels)} classes"
    more = f" (and {len(missing) - 1} other classes)" if len(missing) > 1 else ""
    raise DataError(f"Cannot use this data: {needed}, of which none is left for {split}{more}. {remedy}.")
