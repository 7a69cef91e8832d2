"""Files of labelled rows: each way to write the same rows is read alike, and each fault is named where it stands."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.data.files import class_ids, key, label_values, read_file, rows_of
from agnews_lora.data.rows import MAX_CHARACTERS, Rows
from agnews_lora.errors import DataError

AG_NEWS = ("Class Index", "Title", "Description")
NAMES = ("World", "Sports", "Business", "Sci/Tech")
EXPECTED = Rows(("Oil falls again.", "A b", "NA", "null"), (1, 0, 1, 0))
RECORDS = [("Oil falls again.", "sad"), ("A b", "glad"), ("NA", "sad"), ("null", "glad")]
HEADER = "text,label\n"


def rows(path: Path, text=("text",), label="label", labels=None, columns=None, cleaning=None) -> Rows:
    """The rows of a file; the label column alone tells the same labels."""
    table = read_file(path, text, label, columns)
    found, declared = label_values(path, label, columns)
    assert (found, declared) == (set(table.label_keys), table.declared)
    _, ids = class_ids(table.label_keys, labels, table.declared, label, table.name)
    return rows_of(table, ids, cleaning)


def names(path: Path, labels=None) -> tuple[str, ...]:
    found, declared = label_values(path, "label", None)
    return class_ids(found, labels, declared, "label", str(path))[0]


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def fault(path: Path, **others) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, **others)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Each way to write the same rows -------------------------------------------------------------------------------------


def lines(*records: str, end: str = "\n") -> str:
    return "".join(record + end for record in records)


CSV = HEADER + lines(*(f"{text},{label}" for text, label in RECORDS))
JSONL = lines(*(json.dumps({"text": text, "label": label}) for text, label in RECORDS))
FORMS = {
    "plain.csv": CSV,
    "bom.csv": "\ufeff" + CSV,
    "bom-quoted.csv": '\ufeff"text","label"\n' + lines(*(f'"{text}","{label}"' for text, label in RECORDS)),
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "cr.csv": CSV.replace("\n", "\r"),
    "blank-end.csv": CSV + "\n \n",
    "no-end.csv": CSV.rstrip(),
    "index.csv": ",label,text\n" + lines(*(f"{row},{label},{text}" for row, (text, label) in enumerate(RECORDS))),
    "spaces.csv": "text , label\n" + lines(*(f"{text},{label} " for text, label in RECORDS)),
    "twice.csv": "other,text,other,label\n" + lines(*(f",{text},x,{label}" for text, label in RECORDS)),
    "order.tsv": "label\ttext\n" + lines(*(f"{label}\t{text}" for text, label in RECORDS)),
    "packed.csv.gz": CSV,
    "packed.tsv.gz": CSV.replace(",", "\t"),
    "UPPER.CSV": CSV,
    "odd%20name[1]?#.csv": CSV,
    "lines.jsonl": JSONL,
    "lines.json": JSONL + "\n",
    "bom.jsonl": "\ufeff" + JSONL,
    "packed.jsonl.gz": JSONL,
    "array.json": json.dumps([{"text": text, "label": label} for text, label in RECORDS]),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_in_any_form(write, name):
    path = write(FORMS[name], name)
    assert rows(path) == EXPECTED
    assert names(path) == ("glad", "sad")


def test_the_same_rows_as_parquet(tmp_path):
    frame = pd.DataFrame(RECORDS, columns=["text", "label"])
    for labels in (frame["label"], frame["label"].astype("category")):
        frame.assign(label=labels).to_parquet(tmp_path / "rows.parquet")
        assert rows(tmp_path / "rows.parquet") == EXPECTED
        assert names(tmp_path / "rows.parquet") == ("glad", "sad")


def test_class_labels_of_a_parquet_file_are_names(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["sad", "glad"]))
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    path = tmp_path / "rows.parquet"
    assert names(path) == ("sad", "glad")
    assert rows(path).labels == (1, 0, 1)
    assert rows(path, labels=("glad", "sad")).labels == (0, 1, 0)
    assert rows(path, labels=("down", "up")).labels == (1, 0, 1)
    assert rows(path, labels={"sad": "down", "1": "up"}).labels == (1, 0, 1)


def test_a_text_of_several_columns_is_joined_without_the_empty_ones(write):
    path = write('a,b,label\n"Two\nlines",,x\n,text,y\nboth,of them,x\n')
    assert rows(path, text=("a", "b")).texts == ("Two\nlines", "text", "both of them")
    path = write('{"a": null, "b": "text", "label": 1}\n{"a": "A", "b": "b", "label": 2}\n', "rows.jsonl")
    assert rows(path, text=("a", "b")).texts == ("text", "A b")


def test_the_original_ag_news_file_and_kaggles_give_the_same_rows(write):
    original = '"3","Oil falls","Prices of\\crude fell to \\$41, analysts #39; data said."\n"1","A","B"\n'
    expected = Rows(("Oil falls Prices of crude fell to $41, analysts' data said.", "A B"), (2, 0))
    ag_news = {"text": AG_NEWS[1:], "label": AG_NEWS[0], "labels": NAMES, "cleaning": "ag_news"}
    for start in ("", "\ufeff"):
        assert rows(write(start + original), columns=AG_NEWS, **ag_news) == expected
        assert rows(write(start + ",".join(AG_NEWS) + "\n" + original), **ag_news) == expected


fields = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), fields, fields), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_rows_that_csv_writes_are_read_back(tmp_path_factory, records, header, tabs):
    records = [(0, "first", "row"), (1, "second", "row"), *records]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, delimiter="\t" if tabs else ",")
    writer.writerows([*([AG_NEWS] if header else []), *((label, a, f"end {b}") for label, a, b in records)])
    path = tmp_path_factory.getbasetemp() / f"round_trip.{'tsv' if tabs else 'csv'}"
    path.write_bytes(text.getvalue().encode())
    read = rows(path, AG_NEWS[1:], AG_NEWS[0], labels=NAMES, columns=None if header else AG_NEWS)
    assert read.labels == tuple(label for label, _, _ in records)
    assert read.texts == tuple(f"{a} end {b}" if a else f"end {b}" for _, a, b in records)


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((1, "1"), (1.0, "1"), ("1", "1"), (" 1.00 ", "1"), ("01", "01"), ("-1", "-1"), ("9" * 5_000, "9" * 5_000)),
        *((True, "true"), ("FALSE", "false"), ("١", "١"), (0.5, "0.5"), ("a b ", "a b"), ("NA", "NA")),
        *((None, None), ("  ", None), (float("nan"), None), ([1], None), ({"a": 1}, None)),
    ],
)
def test_a_label_is_the_same_however_it_is_written(value, expected):
    assert key(value) == expected


@pytest.mark.parametrize(
    ("found", "given", "names", "ids"),
    [
        ("b a", None, ("a", "b"), {"a": 0, "b": 1}),
        ("10 9 -1", None, ("-1", "9", "10"), {"-1": 0, "9": 1, "10": 2}),
        ("true false", None, ("false", "true"), {"false": 0, "true": 1}),
        ("a b", ("b", "a"), ("b", "a"), {"b": 0, "a": 1}),
        ("0 1", ("no", "yes"), ("no", "yes"), {"0": 0, "1": 1}),
        ("1 2", ("no", "yes"), ("no", "yes"), {"1": 0, "2": 1}),
        ("2", ("no", "yes"), ("no", "yes"), {"1": 0, "2": 1}),
        ("2 3", ("2", "3"), ("2", "3"), {"2": 0, "3": 1}),
        ("1 2 3", {"1": "bad", "2": "bad", "3": "good"}, ("bad", "good"), {"1": 0, "2": 0, "3": 1}),
        ("true false", {"true": "yes", "false": "no"}, ("yes", "no"), {"true": 0, "false": 1}),
    ],
)
def test_names_of_the_classes(found, given, names, ids):
    assert class_ids(found.split(), given, None, "label", "rows.csv") == (names, ids)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (map(str, range(1_001)), "it has 1,001 different values, over the most that are taken, 1,000"),
        (["a"], "every label is 'a'"),
        (["1", "1.5"], "the value '1.5' is no whole number"),
        (["a", "b" * 300], "is no printable name of at most 200 characters"),
        (["a", "b\nc"], r"the value 'b\nc' is no printable name"),
    ],
)
def test_a_column_of_no_classes_is_refused(found, said):
    with pytest.raises(DataError) as caught:
        class_ids(found, None, None, "label", "rows.csv")
    assert str(caught.value).startswith("Cannot use column 'label' of rows.csv as label: ")
    assert said in str(caught.value)


def test_a_thousand_classes_are_taken():
    names, ids = class_ids(map(str, range(1_000)), None, None, "label", "rows.csv")
    assert (names[10], ids["999"]) == ("10", 999)


# Faults --------------------------------------------------------------------------------------------------------------

INSIDE = "a quote stands inside a field that is not quoted"


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        (HEADER + "a,x\nonly a text\n", "line 3", "it should have 2 fields, as the header has, but has 1"),
        (HEADER + "a,x\n\na,x,more\n", "line 4", "should have 2 fields, as the header has, but has 3"),
        (HEADER + '"two\nlines",x\n"three\nmore\nlines"\n', "line 4", "should have 2 fields"),
        (HEADER + '1, "Title"\n', "line 2", INSIDE),
        (HEADER + 'A 5" pizza,x\n', "line 2", INSIDE),
        (HEADER + 'a,x\n"closed" too early,x\n', "line 3", INSIDE),
        (HEADER + 'a,x\n"never closed,x\n"b","y"\n', "line 3", INSIDE),
        (HEADER + 'a,x\n"escaped \\"so\\", b",y\n', "line 3", INSIDE),
        ('text,"label\na,x\n', "line 1", INSIDE),
        (HEADER + "a,\nb,y\nc,x\n", "line 2", "it has no label"),
        (HEADER + ",x\nb,y\n", "line 2", "the text has nothing visible in it"),
        (HEADER + "\u200b\ufeff,x\nb,y\n", "line 2", "the text has nothing visible in it"),
        (HEADER + f"{'a' * (MAX_CHARACTERS + 1)},x\nb,y\n", "line 2", "the text has 100,001 characters"),
        (HEADER.encode() + b"caf\xe9,x\n", "line 2", "is not UTF-8 (byte 0xE9)"),
        (HEADER + "a\0,x\n", "line 2", "holds a NUL character"),
        (gzip.compress(HEADER.encode(), mtime=0), "it is a packed file", ".gz"),
        (HEADER.encode("utf-16"), "it is UTF-16", "Save it as UTF-8"),
        (HEADER + f"{'a' * 200_000},x\nb\n", "line 3", "should have 2 fields"),
        ("text;label\na;x\n", "it has no column 'text', but 'text;label'", "separated by semicolons"),
        ("text;label\na, b;x\n", "line 2", "separated by semicolons"),
        ('text\tlabel\na\t"x"\n', "line 2", "separated by tabs"),
        ("a,x\nb,y\n", "no column 'text', but 'a', 'x'", "A file without a header needs `columns:`"),
        ("text,text,label\na,b,x\n", "it has 2 columns 'text'", "Name its columns"),
        ("", "it holds no rows", "Fetch it again"),
        (HEADER, "it holds no rows", "Fetch it again"),
    ],
)
def test_a_fault_of_a_csv_file_is_named(write, content, place, said):
    message = fault(write(content))
    assert place in message and said in message, message


TWO = '{"text": "c", "label": 3}\n{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"\n', "line 2", "it is not JSON in Unicode"),
        ('{"text": "a", "label": 1}\n\n{"text": null, "label": 2}\n', "line 3", "the text is missing"),
        ('{"text": "a", "label": 1}\n{"label": 2}\n', "line 2", "the text is missing"),
        (TWO + '{"text": "b"}\n', "line 3", "it has no label"),
        (TWO + '{"text": "b", "label": NaN}\n', "line 3", "no label"),
        ('{"text": "a", "label": 1}\n{"text": {"b": 1}, "label": 2}\n', "line 2", "the text is {'b': 1}, no text"),
        ('{"text": "a", "label": 1}\n{"text": 5, "label": 2}\n', "line 2", "the text is 5, no text"),
        (TWO + '{"text": "b", "label": [2]}\n', "line 3", "the label is [2], no word"),
        ('{"text": "a", "label": 1}\n{"text": "b\\ud83d", "label": 2}\n', "line 2", "surrogate"),
        ('{"text": "a", "label": [1]}\n{"text": "b", "label": [2]}\n', "line 1", "the label is [1], no word"),
        ('{"data": [{"text": "a", "label": 1}]}', "it has no column 'text', but 'data'", "Name its columns"),
        ('{"text": "a", "class": 1}\n', "it has no column 'label', but 'text', 'class'", "Name its columns"),
        ('[{"text": "a", "label": 1}, {"text": "", "label": 2}]', "row 2", "nothing visible"),
        ("[1, 2", "Cannot read", "Write the file again"),
        ("1\n2\n", "Cannot", ""),
        ('"a"\n', "line 1", "it is no JSON object"),
        ("\n", "it holds no rows", "Fetch it again"),
        (b'{"text": "caf\xe9", "label": 1}\n', "line 1", "is not UTF-8"),
    ],
)
def test_a_fault_of_a_json_file_is_named(write, content, place, said):
    message = fault(write(content, "rows.jsonl"))
    assert place in message and said in message, message


def test_a_fault_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("no parquet")
    assert "Write the file again" in fault(path)
    pd.DataFrame({"text": ["a", None], "label": [1, 2]}).to_parquet(path)
    assert "row 2: the text is missing" in fault(path)
    pd.DataFrame({"text": ["a", "b"], "label": [1.0, None]}).to_parquet(path)
    assert "row 2: it has no label" in fault(path, labels=("x", "y"))
    assert "it has no column 'body', but 'text', 'label'" in fault(path, text=("body",))


def test_a_damaged_packed_file_is_refused(write):
    path = write(CSV, "rows.csv.gz")
    path.write_bytes(path.read_bytes()[:-9])
    assert "Cannot read" in fault(path)
    path.write_text("not packed")
    assert "Cannot read" in fault(path)


def test_a_label_that_is_not_named_is_refused_by_its_line(write):
    message = fault(write(HEADER + "a,x\nb,y\nc,z\n"), labels=("x", "y"))
    assert message.splitlines()[1:] == ["  line 4: the label 'z' is none of 'x', 'y'"]
    # The header once more, as in two files that were put together.
    numbered = HEADER + "a,1\nb,2\n" + HEADER + "c,1\n"
    message = fault(write(numbered), labels=("x", "y"))
    assert message.splitlines()[1:] == ["  line 4: the label 'label' is none of '1', '2'"]


def test_a_header_where_the_columns_are_named_is_refused(write):
    message = fault(write("Text,Label\na,x\nb,y\n"), columns=("text", "label"))
    assert "line 1 is a header. Leave `columns:` out" in message


def test_five_faults_are_named_at_once(write):
    message = fault(write(HEADER + "a\nb,x\n" * 20))
    assert [f"line {line}:" in message for line in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    message = fault(write(HEADER + ",y\nb,x\n" * 20))
    assert [f"line {line}:" in message for line in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.csv", "No such file or directory"),
        ("folder.csv", "it is a folder"),
        ("pipe.csv", "it is no regular file"),
        ("/dev/zero", "it is no regular file"),
        ("rows.txt", "its name does not tell a kind of file that is known"),
        ("rows.parquet.gz", "its name does not tell a kind of file that is known"),
    ],
)
@pytest.mark.timeout(30)
def test_a_path_to_no_such_file_is_neither_waited_for_nor_read(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.csv")
    Path("folder.csv").mkdir()
    for each in ("rows.txt", "rows.parquet.gz"):
        Path(each).write_text(CSV)
    message = fault(Path(name))
    assert message.startswith(f"Cannot read {name}: {said}") and ".parquet" in message


@pytest.mark.skipif("AG_NEWS_DIR" not in os.environ, reason="AG_NEWS_DIR names no folder with the real AG News rows")
def test_real_rows_are_read_whole():
    path = Path(os.environ["AG_NEWS_DIR"], "test.csv")
    read = rows(path, AG_NEWS[1:], AG_NEWS[0], labels=NAMES, cleaning="ag_news")
    assert [read.labels.count(label) for label in range(4)] == [950] * 4
