"""What a client of the scoring server may send, read strictly: texts, or a refusal that says what is wrong.

MLflow's own reader answers some wrong input with a status of 500, some with a traceback, and labels `null`, numbers and
the CSV field `NA` as if they were texts. So requests are read here, and it is handed what it cannot misread.
"""

import csv
import io
import json
import re
from typing import Any, Final

from agnews_lora.serving.markdown import one_line

MAX_BODY_BYTES: Final = 512 * 1024
# With the longest text they bound what one request can cost: on two CPU cores, seconds for MiniLM and half a minute for
# `roberta-base`, within the minute that MLflow gives a request.
MAX_TEXTS: Final = 256
MAX_TEXT_CHARACTERS: Final = 5_000  # five times the longest item of AG News; the model reads the first 80 tokens or so

JSON: Final = "application/json"
CSV: Final = "text/csv"
COLUMN: Final = "text"
_LISTS: Final = ("inputs", "instances")
_SPLIT: Final = "dataframe_split"
_RECORDS: Final = "dataframe_records"
_FORMATS: Final = (*_LISTS, _SPLIT, _RECORDS)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WANTED: Final = 'send {"inputs": ["a text", "another"]}'


class Refusal(Exception):
    """A request that is not answered.

    status: HTTP's. reason: rule, value and remedy; it quotes nothing at length. headers: more of the answer's.
    """

    def __init__(self, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers


def require_content_type(given: str | None, encoding: str | None) -> str:
    """`JSON` or `CSV`, from the headers Content-Type and Content-Encoding.

    Raises:
        Refusal: 415 for anything else.
    """
    kind, *parameters = [part.strip().lower() for part in (given or "").split(";")]
    if kind not in (JSON, CSV):
        found = f"is {_short(given)}" if given else "is missing"
        raise Refusal(415, f"the header Content-Type must be {JSON} or {CSV}, but {found}; set it")
    charsets = [part.removeprefix("charset=").strip('"') for part in parameters if part.startswith("charset=")]
    if any(charset not in ("utf-8", "utf8") for charset in charsets):
        raise Refusal(415, f"the charset must be utf-8, but is {_short(charsets[0])}; convert the body")
    if (encoding or "identity").strip().lower() != "identity":
        raise Refusal(415, f"a body must not be encoded, but its Content-Encoding is {_short(encoding)}; send it plain")
    return kind


def read_texts(body: bytes, content_type: str) -> list[str]:
    """The texts in a request's body, in order.

    As JSON `{"inputs": …}` or `{"instances": …}` with a list of texts, a list of records or `{"text": […]}`; that list
    alone; or MLflow's `{"dataframe_records": […]}` and `{"dataframe_split": {"columns": […], "data": […]}}`. As CSV
    with a first line that names a column `text`. Columns and keys beside `text` are not read.

    Raises:
        Refusal: 400 for what is not that, 413 for too many texts or too long ones.
    """
    try:
        decoded = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body must be UTF-8, but is not (byte {error.start}); convert it") from error
    if not decoded.strip():
        raise Refusal(400, f"a body is needed, but it is empty; {_WANTED}")
    texts = _csv_texts(decoded) if content_type == CSV else _json_texts(decoded)
    return _checked(texts)


def _checked(texts: list[Any]) -> list[str]:
    """Every element is a text of a fair length that a tokenizer can read, and there is at least one."""
    if not texts:
        raise Refusal(400, f"at least one text is needed, but there is none; {_WANTED}")
    if len(texts) > MAX_TEXTS:
        raise Refusal(413, f"a request takes at most {MAX_TEXTS} texts, but has {len(texts):,}; send several")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refusal(400, f"every text must be a string, but text {index} (counted from 0) is {_kind(text)}")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise Refusal(
                413,
                f"a text takes at most {MAX_TEXT_CHARACTERS:,} characters, but text {index} (counted from 0) has "
                f"{len(text):,}; cut it: the model reads only the beginning",
            )
        if _SURROGATE.search(text):
            raise Refusal(400, f"a text must be Unicode, but text {index} (counted from 0) has half a surrogate pair")
    return texts


def _json_texts(decoded: str) -> list[Any]:
    try:
        document = json.loads(decoded, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"the body must be JSON, but is not ({error.msg}, {place}); {_WANTED}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        reason = f"the body must be plain JSON, but nests too deeply or has too long a number; {_WANTED}"
        raise Refusal(400, reason) from error
    if isinstance(document, list):
        return _listed(document)
    if not isinstance(document, dict):
        raise Refusal(400, f"the body must be an object or a list, but is {_kind(document)}; {_WANTED}")
    if document.get("params"):
        raise Refusal(400, "this model takes no `params`, but there are some; leave them out")
    given = [key for key in document if key != "params"]
    if len(given) != 1 or given[0] not in _FORMATS:
        found = ", ".join(_short(key) for key in given[:5]) or "none"
        raise Refusal(400, f"the object must have one key of {', '.join(_FORMATS)}, but has {found}; {_WANTED}")
    [(key, value)] = [(key, document[key]) for key in given]
    if key == _SPLIT:
        return _split(value)
    if key == _RECORDS and not (isinstance(value, list) and all(isinstance(record, dict) for record in value)):
        raise Refusal(400, f'`{key}` must be a list of objects; send {{"{key}": [{{"{COLUMN}": "a text"}}]}}')
    return _listed(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise Refusal(400, "an object must have a key only once, but has one twice; leave one out")
    return document


def _listed(value: Any) -> list[Any]:
    """A list of texts or of records, or a column of texts."""
    if isinstance(value, dict) and isinstance(value.get(COLUMN), list):
        return list(value[COLUMN])
    if not isinstance(value, list):
        raise Refusal(400, f"the texts must be a list, but are {_kind(value)}; {_WANTED}")
    if value and isinstance(value[0], dict):
        return [_of_record(record, index) for index, record in enumerate(value)]
    return value


def _of_record(record: Any, index: int) -> Any:
    if not isinstance(record, dict) or COLUMN not in record:
        found = f"has no key `{COLUMN}`" if isinstance(record, dict) else f"is {_kind(record)}"
        raise Refusal(
            400, f'every record must be {{"{COLUMN}": "a text"}}, but record {index} (counted from 0) {found}; add it'
        )
    return record[COLUMN]


def _split(value: Any) -> list[Any]:
    wanted = f'send {{"{_SPLIT}": {{"columns": ["{COLUMN}"], "data": [["a text"]]}}}}'
    if not isinstance(value, dict):
        raise Refusal(400, f"`{_SPLIT}` must be an object, but is {_kind(value)}; {wanted}")
    columns, data = value.get("columns"), value.get("data")
    if not isinstance(columns, list) or columns.count(COLUMN) != 1:
        raise Refusal(400, f"`columns` must be a list with `{COLUMN}` in it once, but is not; {wanted}")
    if not isinstance(data, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        raise Refusal(400, f"`data` must be a list of rows, each a list of {len(columns)}, but is not; {wanted}")
    return [row[columns.index(COLUMN)] for row in data]


def _csv_texts(decoded: str) -> list[Any]:
    wanted = f"send a first line that names a column `{COLUMN}`, and a row each text, quoted where it has commas"
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(decoded, newline=""), strict=True) if row]
    except (csv.Error, ValueError) as error:
        raise Refusal(400, f"the body must be CSV, but is not ({_short(str(error))}); {wanted}") from error
    if header.count(COLUMN) != 1:
        raise Refusal(400, f"the first line must name a column `{COLUMN}` once, but does not; {wanted}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise Refusal(400, f"row {number} must have {len(header)} fields, but has {len(row)}; {wanted}")
    return [row[header.index(COLUMN)] for row in rows]


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


def _short(value: str | None) -> str:
    """A client's own word, for a message: on one line, and cut."""
    line = one_line(value or "")
    return repr(line if len(line) <= 40 else f"{line[:40]}…")
