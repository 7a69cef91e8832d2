"""Labelled rows: read from AG News's CSV files, and divided by class and by seed alone."""

import csv
import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agnews_lora.data.cleaning import clean
from agnews_lora.errors import DataError

HEADER: Final = ("Class Index", "Title", "Description")
MAX_CHARACTERS: Final = 10_000  # of a row's text: ten times the longest of AG News
_REPORTED: Final = 5  # malformed rows named in one message


@dataclass(frozen=True)
class Rows:
    """Texts and their labels (indices into the data's label names), in order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Sequence[int]) -> "Rows":
        """The rows of these ids, in the order of the ids."""
        return Rows(tuple(self.texts[row] for row in ids), tuple(self.labels[row] for row in ids))

    def digest(self) -> str:
        """SHA-256 (hex) over every row in order; each text goes in behind its length, so that no two lists collide."""
        sha = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            encoded = text.encode()
            sha.update(f"{label} {len(encoded)}\n".encode())
            sha.update(encoded)
        return sha.hexdigest()


def stratified_subset(labels: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """Ids of `num_rows` rows, ascending, in which every class keeps its share; all ids where there are no more rows.

    The shares are made whole by largest remainder (ties: the lower label). Which rows of a class are taken depends on
    `seed` alone.
    """
    if num_rows >= len(labels):
        return list(range(len(labels)))
    row_labels = np.asarray(labels)
    classes, counts = np.unique(row_labels, return_counts=True)
    quotas, remainders = np.divmod(counts * num_rows, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: num_rows - quotas.sum()]] += 1
    random = np.random.Generator(np.random.PCG64(seed))
    taken = [
        random.permutation(np.flatnonzero(row_labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return sorted(np.concatenate(taken).tolist())


def stratified_split(labels: Sequence[int], num_validation: int, seed: int) -> tuple[list[int], list[int]]:
    """(training ids, validation ids), both ascending and together all rows; see `stratified_subset` for the shares."""
    validation = stratified_subset(labels, num_validation, seed)
    held_out = set(validation)
    return [row for row in range(len(labels)) if row not in held_out], validation


def require_file(path: Path) -> None:
    """Check that the path is a regular file that can be opened: a pipe could block, and a device never ends.

    Raises:
        DataError: it is not.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            found = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"Cannot read {path}: it is {found}. Name a CSV file of AG News.")
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. Name a CSV file of AG News.") from error


class _MalformedRow(Exception):
    """A row breaks a rule; the message says which one, and the value."""


def read_csv(path: Path, names: Sequence[str] = ("World", "Sports", "Business", "Sci/Tech")) -> Rows:
    """The rows of an AG News file: the Kaggle release with its header, or the original one without.

    Columns: class index (1..4), title, description; the text is title and description,
    cleaned. UTF-8, quoted as in RFC 4180. Labels of the result count from 0.

    Raises:
        DataError: the file cannot be read, holds no rows, or holds malformed ones: the first five are named by the line
            they start on (counted as an editor does, so that a quoted text may span several).
    """
    require_file(path)
    texts: list[str] = []
    labels: list[int] = []
    faults: list[str] = []
    line = 0
    try:
        for line, row in _records(path):
            if line == 1 and tuple(row) == HEADER:
                continue
            try:
                label, text = _read_row(row, names)
            except _MalformedRow as fault:
                hint = f" (or the header {','.join(HEADER)})" if line == 1 else ""
                faults.append(f"line {line}: {fault}{hint}")
                if len(faults) == _REPORTED:
                    break
            else:
                labels.append(label)
                texts.append(text)
    except _MalformedRow as fault:
        faults.append(str(fault))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    if faults:
        raise DataError("\n  ".join([f"Cannot read {path}: correct these rows", *faults]))
    if not texts:
        raise DataError(f"Cannot read {path}: it holds no rows. Fetch the file again.")
    return Rows(tuple(texts), tuple(labels))


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it starts on, fields) of every record; raises `_MalformedRow` where the records themselves break off."""
    with path.open("rb") as file:
        reader = csv.reader((raw.decode() for raw in file), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02X}"
                raise _MalformedRow(
                    f"line {reader.line_num + 1}: text should be UTF-8, but byte {error.start + 1} there is {byte}"
                ) from error
            except csv.Error as error:
                raise _MalformedRow(f"line {line}: in the record that starts here, {_broken(error)}") from error
            if line == 1 and row:
                row[0] = row[0].removeprefix("\ufeff")  # byte order mark
            yield line, row


def _broken(error: csv.Error) -> str:
    """The rule that a record breaks."""
    said = str(error)
    if "field limit" in said:
        return f"a field has more than {csv.field_size_limit():,} characters (is a quote never closed?)"
    if "new-line" in said:
        return "a line ends in CR alone, not in LF or CR LF"
    return f"a quoted field is not closed, or a quote inside it not doubled ({said})"


def _read_row(row: list[str], labels: Sequence[str]) -> tuple[int, str]:
    """(label from 0, cleaned text)."""
    if len(row) != len(HEADER):
        raise _MalformedRow(f"a row should have {len(HEADER)} columns, but has {len(row)}")
    index, title, description = row
    numbers = [str(label) for label in range(1, len(labels) + 1)]
    if index not in numbers:
        names = ", ".join(f"{number} {name}" for number, name in zip(numbers, labels, strict=True))
        raise _MalformedRow(f"the class index should be one of {names}, but is {index!r}")
    if (size := len(title) + len(description)) > MAX_CHARACTERS:
        raise _MalformedRow(f"title and description may have at most {MAX_CHARACTERS:,} characters, but have {size:,}")
    text = clean(f"{title} {description}")
    if not text:
        raise _MalformedRow("title and description have no text")
    return int(index) - 1, text
