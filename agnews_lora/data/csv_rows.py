"""AG News as CSV files: read whole, or refused with the lines that are wrong."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agnews_lora.data.cleaning import clean
from agnews_lora.data.splits import LABELS, Rows
from agnews_lora.errors import DataError

HEADER: Final = ("Class Index", "Title", "Description")
_REPORTED: Final = 5  # malformed rows named in one message


class _MalformedRow(Exception):
    """The rule that a row breaks, and its value."""


def read_csv(path: Path) -> Rows:
    """The rows of an AG News file: the Kaggle release with its header, or the original one without.

    Columns: class index (1..4, in the order of `LABELS`), title, description; the text is title and description,
    cleaned. UTF-8, quoted as in RFC 4180. Labels of the result count from 0.

    Raises:
        DataError: the file cannot be read, holds no rows, or holds malformed ones: the first five are named by the line
            they start on (counted as an editor does, so that a quoted text may span several).
    """
    texts: list[str] = []
    labels: list[int] = []
    faults: list[str] = []
    line = 0
    try:
        for line, row in _records(path):
            if line == 1 and tuple(row) == HEADER:
                continue
            try:
                label, text = _read_row(row)
            except _MalformedRow as fault:
                hint = f" (or the header {','.join(HEADER)})" if line == 1 else ""
                faults.append(f"{path}, line {line}: {fault}{hint}")
                if len(faults) == _REPORTED:
                    break
            else:
                labels.append(label)
                texts.append(text)
    except _MalformedRow as fault:
        faults.append(f"{path}, {fault}")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a CSV file of AG News") from error
    if faults:
        raise DataError("\n".join([*faults, f"correct {path.name} and start again"]))
    if not texts:
        raise DataError(f"{path} holds no rows, but needs at least one; fetch the file again")
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
                    f"line {reader.line_num + 1}: text must be UTF-8, but byte {error.start + 1} of the line is {byte}"
                ) from error
            except csv.Error as error:
                raise _MalformedRow(
                    f"line {line}: a quoted field is closed, and every quote inside it doubled, but not in the record "
                    f"that starts here ({error})"
                ) from error
            if line == 1 and row:
                row[0] = row[0].removeprefix("\ufeff")  # byte order mark
            yield line, row


def _read_row(row: list[str]) -> tuple[int, str]:
    """(label from 0, cleaned text)."""
    if len(row) != len(HEADER):
        raise _MalformedRow(f"a row has {len(HEADER)} columns, but here are {len(row)}")
    index, title, description = row
    numbers = [str(label) for label in range(1, len(LABELS) + 1)]
    if index not in numbers:
        names = ", ".join(f"{number} {name}" for number, name in zip(numbers, LABELS, strict=True))
        raise _MalformedRow(f"the class index is one of {names}, but here is {index!r}")
    text = clean(f"{title} {description}")
    if not text:
        raise _MalformedRow("title and description hold some text, but here is none")
    return int(index) - 1, text
