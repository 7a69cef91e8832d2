"""Labelled rows in files, and in splits of the hub: columns read by `datasets`, labels and texts checked row by row.

A fault is named by its file and line, as an editor counts them, or by its row where the file has no lines.
"""

import codecs
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from agnews_lora.data.rows import Rows, TextFault, usable_text
from agnews_lora.errors import DataError, StorageError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_LABELS: Final = 1_000
MAX_NAME: Final = 200  # characters of a label's name
_SEPARATORS: Final = {".csv": ",", ".tsv": "\t"}
_ENDINGS: Final = (*_SEPARATORS, ".jsonl", ".json", ".parquet")
_NEWLINE: Final = re.compile(r"\r\n|\r|\n")
_WHOLE: Final = re.compile(r"(-?(?:0|[1-9][0-9]{0,14}))(?:\.0*)?")
_NUMBER: Final = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_REPORTED: Final = 5  # faults named in one message
_BATCH: Final = 10_000

Columns = tuple[str, ...]
Labels = tuple[str, ...] | Mapping[str, str] | None


@dataclass(frozen=True)
class Table:
    """Rows of a file or of a hub split, before they are checked.

    Args:
        name: of the file or split, for messages.
        texts: of each row, the values of its text columns.
        labels: of each row, its value, of any type.
        places: of each row, its line or number; made when a fault is named.
        declared: names of the classes by number, where the data set has a `ClassLabel`.
    """

    name: str
    texts: list[tuple[Any, ...]]
    labels: list[Any]
    places: Callable[[], Sequence[str]]
    declared: tuple[str, ...] | None = None

    @property
    def label_keys(self) -> list[str | None]:
        """Of each row, its label as `key` writes it; with a `ClassLabel`, the name. None: the row has none."""
        if self.declared is None:
            return [key(value) for value in self.labels]
        names = dict(enumerate(map(key, self.declared)))
        return [names.get(value) for value in self.labels]


def key(value: object) -> str | None:
    """A label as text, the same for each way to write it: 1, 1.0, "1" and " 1" are 1; True and "true" are true.

    None where there is no label: an empty value, or not a number; or where it is a list or a record.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, list | dict):
        return None
    text = str(value).strip()
    if isinstance(value, float) and text == "nan":
        return None
    whole = _WHOLE.fullmatch(text)
    if whole:
        return str(int(whole[1]))
    return text.lower() if text.lower() in ("true", "false") else text or None


# Labels --------------------------------------------------------------------------------------------------------------


def class_ids(
    found: Iterable[str | None], given: Labels, declared: tuple[str, ...] | None, column: str, name: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """(names of the classes in order, {label as `key` writes it: class id}); no names where no row has a label.

    Args:
        found: labels of the training rows, as `key` writes them.
        given: `labels:` of the experiment: names in order, or {value in the file: name}.
        declared: as of `Table`.
        column, name: where the labels stand, for messages.

    Raises:
        DataError: the column does not hold the labels of 2 to `MAX_LABELS` classes.
    """
    values = {value for value in found if value is not None}
    numbers = all(map(_NUMBER.fullmatch, values))
    if isinstance(given, Mapping):
        names = tuple(dict.fromkeys(given.values()))
        by_number = {str(number): str(key(label)) for number, label in enumerate(declared or ())}
        keys = [str(key(value)) for value in given]
        keys = [one if one in values else by_number.get(one, one) for one in keys]
        return names, {one: names.index(label) for one, label in zip(keys, given.values(), strict=True)}
    if given is not None:
        keys = [str(key(label)) for label in given]
        if declared is not None and len(declared) == len(given) and not values <= set(keys):
            keys = [str(key(label)) for label in declared]
        elif not values <= set(keys) and (numbers or not values & set(keys)):
            first = 0 if "0" in values else 1
            keys = [str(number) for number in range(first, first + len(given))]
        return given, {label: number for number, label in enumerate(keys)}
    where = f"Cannot use column {column!r} of {name} as label"
    if (number := len(declared or values)) > MAX_LABELS:
        raise DataError(
            f"{where}: it has {number:,} different values, over the most that are taken, {MAX_LABELS:,}. "
            "Name the column of the classes as `label:`."
        )
    fractions = [value for value in sorted(values) if numbers and not _WHOLE.fullmatch(value)]
    odd = [value for value in sorted(values) if len(value) > MAX_NAME or not value.isprintable()]
    if fractions or odd:
        rule = "no whole number" if fractions else f"no printable name of at most {MAX_NAME} characters"
        raise DataError(
            f"{where}: the value {_shown((fractions or odd)[0])} is {rule}. Name the column of the classes as `label:`."
        )
    if declared is None:
        declared = tuple(sorted(values, key=lambda value: (int(value), "") if numbers else (0, value)))
    if len(declared) == 1:
        raise DataError(f"{where}: every label is {declared[0]!r}. A classifier needs rows of two classes at least.")
    return declared, {str(key(label)): number for number, label in enumerate(declared)}


def rows_of(table: Table, ids: Mapping[str, int], cleaning: str | None) -> Rows:
    """The rows of a table, each with its text as it is tokenised and its class id.

    Raises:
        DataError: rows without a usable text or a known label: the first five.
    """
    texts, labels, faults = [], [], []
    for row, (parts, value, label) in enumerate(zip(table.texts, table.labels, table.label_keys, strict=True)):
        try:
            texts.append(usable_text(_joined(parts), cleaning))
        except TextFault as fault:
            faults.append((row, f"the text {fault}"))
        if label is None:
            wrong = f"the label is {_shown(value)}, no word" if isinstance(value, list | dict) else "it has no label"
            faults.append((row, wrong))
        elif label in ids:
            labels.append(ids[label])
        else:
            faults.append((row, f"the label {_shown(label)} is none of {_listed(ids)}"))
        if len(faults) >= _REPORTED:
            break
    if faults:
        places = table.places()
        lines = [f"{places[row]}: {fault}" for row, fault in faults[:_REPORTED]]
        raise DataError("\n  ".join([f"Cannot use {table.name}: correct these rows", *lines]))
    if not texts:
        raise DataError(f"Cannot use {table.name}: it holds no rows. Fetch it again, or name another.")
    return Rows(tuple(texts), tuple(labels))


def _joined(parts: Sequence[Any]) -> str:
    """The values of the text columns as one text; a column may be empty where another is not."""
    for part in parts:
        if part is not None and not isinstance(part, str):
            raise TextFault(f"is {_shown(part)}, no text")
    if len(parts) == 1 and parts[0] is None:
        raise TextFault("is missing")
    return " ".join(part for part in parts if part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _listed(names: Iterable[str]) -> str:
    shown = [_shown(name) for name in names]
    return ", ".join(shown) if len(shown) <= 20 else f"{', '.join(shown[:20])}, … ({len(shown)} in all)"


# Files ---------------------------------------------------------------------------------------------------------------


def require_file(path: Path) -> str:
    """Check that the path is a regular file that can be opened, and return its kind, an ending such as `.csv`.

    A pipe could block, and a device never ends.

    Raises:
        DataError: it is not, or its name tells no kind that can be read.
    """
    remedy = f"Name a file that ends in {', '.join(_ENDINGS[:-1])} (each also with .gz) or {_ENDINGS[-1]}."
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            found = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"Cannot read {path}: it is {found}. {remedy}")
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {remedy}") from error
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in _ENDINGS or name.endswith(".parquet.gz"):
        raise DataError(f"Cannot read {path}: its name does not tell a kind of file that is known. {remedy}")
    return kind


def read_file(path: Path, text: Columns, label: str, names: Columns | None) -> Table:
    """The rows of a file.

    Args:
        text, label: names of columns.
        names: of all columns, for a CSV or TSV file without a header.

    Raises:
        DataError: the file cannot be read, or lacks a column; broken records are named, the first five.
        StorageError: no temporary folder can be written.
    """
    kind, wanted = require_file(path), (*text, label)
    if kind in _SEPARATORS:
        content = _decoded(path)
        separator = _SEPARATORS[kind]
        header, lines = _records(path, content, separator, names)
        fields = [str(number) for number in range(len(header))]  # names may be there twice
        chosen = [str(_index(path, content, separator, header, name, names)) for name in wanted]
        from datasets import Features, Value

        found, declared = _load(
            "csv",
            path,
            wanted=chosen,
            sep=separator,
            names=fields,
            header=None if names else 0,
            usecols=sorted(set(chosen), key=int),
            features=Features({name: Value("string") for name in sorted(set(chosen), key=int)}),
            na_filter=False,  # the texts NA and null are texts
            encoding="utf-8-sig",
        )
        places = [f"line {line}" for line in lines]
    elif kind == ".parquet":
        _require_columns(path, _parquet_columns(path), wanted)
        found, declared = _load("parquet", path, wanted, columns=list(dict.fromkeys(wanted)))
        places = []
    else:
        content = _decoded(path)
        if not content.strip():
            raise DataError(f"Cannot use {path}: it holds no rows. Fetch it again, or name another.")
        try:
            # Read in one piece: of a later piece, `datasets` refuses columns and types that the first does not have.
            size = 4 * len(content) + 1
            found, declared = _load("json", path, wanted, parse_agent_traces=False, chunksize=size)
        except DataError:
            _require_json_lines(path, content)
            raise
        places = [f"line {number}" for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    labels = found[-1]
    if len(places) != len(labels):  # the file has no lines, or a row has several
        if kind in _SEPARATORS:
            raise DataError(f"Cannot read {path}: its {len(places):,} records are read as {len(labels):,} rows.")
        places = [f"row {row}" for row in range(1, len(labels) + 1)]
    return Table(str(path), list(zip(*found[:-1], strict=True)), labels, lambda: places, declared)


def read_split(rows: "Dataset", name: str, text: Columns, label: str) -> Table:
    """The rows of a split that `datasets` has loaded; raises as `read_file` does."""
    _require_columns(name, rows.column_names, (*text, label))
    columns = [list(rows[column]) for column in (*text, label)]
    return Table(
        name,
        list(zip(*columns[:-1], strict=True)),
        columns[-1],
        lambda: [f"row {row}" for row in range(1, len(rows) + 1)],
        _declared(rows.features, label),
    )


def label_values(path: Path, label: str, names: Columns | None) -> tuple[set[str | None], tuple[str, ...] | None]:
    """(the labels in a file as `key` writes them, as of `Table`; the names of its `ClassLabel`).

    The label column alone is read, without `datasets`, whose import takes a second; a file with faults is read whole,
    so that they are named.
    """
    kind = require_file(path)
    with suppress(csv.Error, ValueError, KeyError, TypeError, ImportError, OSError):
        if kind in _SEPARATORS:
            content = _decoded(path)
            separator = _SEPARATORS[kind]
            header, _ = _records(path, content, separator, names)
            place = _index(path, content, separator, header, label, names)
            records = _parsed(content, separator)
            if not names:
                next(records)
            return {key(record[place]) for record in records}, None
        if kind == ".jsonl":
            return {key(json.loads(line)[label]) for line in _decoded(path).split("\n") if line.strip()}, None
        if kind == ".parquet":
            from pyarrow import parquet

            if b"huggingface" not in (parquet.read_schema(path).metadata or {}):  # where a ClassLabel would stand
                return set(map(key, parquet.read_table(path, columns=[label])[label].unique().to_pylist())), None
    table = read_file(path, (label,), label, names)
    return set(table.label_keys), table.declared


def _load(
    builder: str, path: Path, wanted: Sequence[str], **options: Any
) -> tuple[list[list[Any]], tuple[str, ...] | None]:
    """(the values of each wanted column, the names of the last one's `ClassLabel`), by a builder of `datasets`."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the errors that it logs are raised as well
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    features = None
    try:
        with TemporaryDirectory() as folder:
            link = Path(
                folder, "rows" + "".join(path.suffixes[-2:]).lower()
            )  # a path may hold what looks like a pattern
            link.symlink_to(path.resolve())
            try:
                rows = datasets.load_dataset(
                    builder,
                    data_files={"train": [str(link)]},
                    split="train",
                    streaming=True,
                    cache_dir=folder,
                    **options,
                )
                features = rows.features
                for batch in rows.iter(_BATCH):
                    _require_columns(path, list(batch), wanted)
                    for name, values in columns.items():
                        values.extend(batch[name])
            except DataError:
                raise
            except Exception as error:  # pandas, pyarrow and datasets raise errors that share no root
                said = (str(error).splitlines() or [type(error).__name__])[0].replace(str(link), str(path))
                raise DataError(f"Cannot read {path}: {said.rstrip('.')}. Write the file again.") from error
    except OSError as error:
        raise StorageError(
            f"Cannot write a temporary folder to read {path}: {error.strerror}. Free it, or set TMPDIR to another."
        ) from error
    return [columns[name] for name in wanted], _declared(features, wanted[-1])


def _declared(features: Any, column: str) -> tuple[str, ...] | None:
    import datasets

    feature = features.get(column) if features else None
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _require_columns(name: object, there: Sequence[str], wanted: Iterable[str]) -> None:
    for column in wanted:
        if column not in there:
            raise DataError(
                f"Cannot use {name}: it has no column {column!r}, but {_listed(there)}. Name its columns as `text:` "
                "and `label:`."
            )


def _parquet_columns(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_schema(path).names)
    except (ArrowException, OSError) as error:
        raise DataError(f"Cannot read {path}: {str(error).rstrip('.')}. Write the file again.") from error


def _decoded(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: it is not UTF-8, or holds a NUL character.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise DataError(f"Cannot read {path}: {reason}. Write the file again.") from error
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise DataError(f"Cannot read {path}: it is a packed file. Give a gzip file the ending .gz; unpack any other.")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"Cannot read {path}: it is UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"Cannot read {path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02X}). Save it as UTF-8; "
            "if it comes from Windows: `iconv -f CP1252 -t UTF-8`."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"Cannot read {path}: line {line} holds a NUL character. Save the file as text in UTF-8.")
    return text


def _records(path: Path, content: str, separator: str, names: Columns | None) -> tuple[list[str], list[int]]:
    """(names of the columns, the line that each row starts on) of a CSV or TSV file; blank lines are no rows.

    Quoted fields that are well-formed (RFC 4180) are taken out: a quote in the rest is one that no parser could read
    right, and the separators in the rest are those between fields.

    Raises:
        DataError: no rows, or broken ones: the first five.
    """
    quoted = re.compile(rf'(?<![^{separator}\r\n])"[^"]*+(?:""[^"]*+)*+"(?![^{separator}\r\n])')
    bare = quoted.sub(lambda field: "q" + "\0" * len(_NEWLINE.findall(field[0])), content)
    records, line = [], 1
    for record in _NEWLINE.split(bare):
        if record.strip(" \t".replace(separator, "")):
            records.append((line, record))
        line += 1 + record.count("\0")
    if len(records) < (1 if names else 2):
        raise DataError(f"Cannot use {path}: it holds no rows. Fetch it again, or name another.")
    hint = _separator_hint(content, separator)
    broken = (
        "a quote stands inside a field that is not quoted, is not doubled inside a quoted field, or is never closed"
    )
    _require(path, [f"line {line}: {broken}" for line, record in records if '"' in record], hint)
    try:
        first = [name.strip() for name in next(_parsed(content, separator))]
    except csv.Error as error:
        raise DataError(f"Cannot read {path}: line {records[0][0]} cannot be read ({error}).") from error
    header = list(names or first)
    if names and [*map(str.lower, first)] == [*map(str.lower, names)]:
        raise DataError(f"Cannot use {path}: line {records[0][0]} is a header. Leave `columns:` out.")
    counts = [(line, record.count(separator) + 1) for line, record in records]
    rule = f"should have {len(header)} fields, as {'`columns:`' if names else 'the header'} has, but has"
    _require(path, [f"line {line}: it {rule} {count}" for line, count in counts if count != len(header)], hint)
    return header, [line for line, _ in records[0 if names else 1 :]]


def _separator_hint(content: str, separator: str) -> str:
    """What to do where the first line seems to have another separator."""
    first = _NEWLINE.split(content.strip(), maxsplit=1)[0]
    words = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
    found = [word for other, word in words.items() if other in first and separator not in first]
    return (
        f"Its columns seem to be separated by {found[0]}: write it with commas (.csv) or tabs (.tsv)." if found else ""
    )


def _require(path: Path, faults: Sequence[str], hint: str = "") -> None:
    if faults:
        lines = [*faults[:_REPORTED], *([hint] if hint else [])]
        raise DataError("\n  ".join([f"Cannot read {path}: correct these rows", *lines]))


def _parsed(content: str, separator: str) -> Iterator[list[str]]:
    """The fields of each record."""
    records = csv.reader(io.StringIO(content, newline=""), delimiter=separator)
    return (record for record in records if len(record) > 1 or "".join(record).strip())


def _index(path: Path, content: str, separator: str, header: Sequence[str], name: str, names: Columns | None) -> int:
    """Position of a column.

    Raises:
        DataError: it is not there, or twice.
    """
    if header.count(name) == 1:
        return header.index(name)
    found = "no column" if name not in header else f"{header.count(name)} columns"
    hint = _separator_hint(content, separator)
    if not hint and not names:
        hint = "A file without a header needs `columns:` with the names of all its columns, in order."
    raise DataError(
        f"Cannot use {path}: it has {found} {name!r}, but {_listed(header)}. Name its columns as `text:` and `label:`. "
        f"{hint}".rstrip()
    )


def _require_json_lines(path: Path, content: str) -> None:
    """Check that every line is a JSON object; a file that is one array has no such lines.

    Raises:
        DataError: lines that are not: the first five.
    """
    faults: list[str] = []
    lines = [] if content.lstrip().startswith("[") else content.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if not line.strip():
                continue
            if not isinstance(json.loads(line), dict):
                faults.append(f"line {number}: it is no JSON object")
            json.dumps(json.loads(line), ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: it is not JSON in Unicode ({error})")
        if len(faults) == _REPORTED:
            break
    _require(path, faults)
