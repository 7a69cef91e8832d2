import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.data.cleaning import clean
from agnews_lora.data.rows import read_csv
from agnews_lora.data.splits import Rows
from agnews_lora.errors import DataError

HEADER = "Class Index,Title,Description\n"


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "rows.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_csv(path)
    return str(caught.value)


def test_kaggle_file_with_header_and_original_file_without_give_the_same_rows(write):
    original = '"3","Oil falls","Prices of\\crude fell to \\$41, analysts #39; data said."\n"1","A","B"\n'
    expected = Rows(("Oil falls Prices of crude fell to $41, analysts' data said.", "A B"), (2, 0))
    assert read_csv(write(original)) == expected
    assert read_csv(write(HEADER + original)) == expected
    assert read_csv(write("\ufeff" + HEADER + original.replace("\n", "\r\n"))) == expected


def test_a_row_may_span_lines_and_lack_a_title_or_a_description(write):
    assert read_csv(write('2,"Two\nlines",\n4,,text\n')) == Rows(("Two lines", "text"), (1, 3))


def test_last_line_needs_no_line_end(write):
    assert read_csv(write("1,a,b")) == Rows(("a b",), (0,))


fields = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(st.integers(1, 4), fields, fields), min_size=1, max_size=6), st.booleans())
def test_what_csv_writes_is_read_back(tmp_path_factory, records, header):
    records = [(label, title, f"end {description}") for label, title, description in records]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(records)
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    path.write_bytes(((HEADER if header else "") + text.getvalue()).encode())
    rows = read_csv(path)
    assert rows.labels == tuple(label - 1 for label, _, _ in records)
    assert rows.texts == tuple(clean(f"{title} {description}") for _, title, description in records)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (HEADER + "1,a,b\n2,only a title\n", 3, "a row has 3 columns, but here are 2"),
        (HEADER + "1,a,b,c\n", 2, "a row has 3 columns, but here are 4"),
        ("1,a,b\n\n2,c,d\n", 2, "a row has 3 columns, but here are 0"),
        (HEADER + "5,a,b\n", 2, "1 World, 2 Sports, 3 Business, 4 Sci/Tech, but here is '5'"),
        ("1,a,b\n0,a,b\n", 2, "but here is '0'"),
        ("1,a,b\nSports,a,b\n", 2, "but here is 'Sports'"),
        ("label,title,text\n1,a,b\n", 1, "but here is 'label' (or the header Class Index,Title,Description)"),
        ("1,a,b\n" + HEADER, 2, "but here is 'Class Index'"),
        ("1,a,b\n2,,\n", 2, "title and description hold some text"),
        ("1,a,b\n2,&lt;b&gt;,\\\n", 2, "title and description hold some text"),
        ('1,"two\nlines",b\n2,"three\nmore\nlines"\n', 3, "a row has 3 columns, but here are 2"),
        ('1,a,b\n2,"never closed,c\n3,d,e\n', 2, "a quoted field is closed"),
        ('1,a,b\n2,"closed" too early,c\n', 2, "a quoted field is closed"),
        ("1,a,b\r2,c,d\r", 1, "a line ends in LF or in CR LF, never in a CR alone"),
        (
            f"1,a,b\n2,a,{'b' * 10_000}\n",
            2,
            "title and description hold at most 10,000 characters, but here are 10,001",
        ),
        (f"1,a,b\n2,a,{'b' * 200_000}\n", 2, "a field holds at most 131,072 characters (is a quote never closed?)"),
        (b"1,a,b\n2,caf\xe9,b\n", 2, "text must be UTF-8, but byte 6 of the line is 0xE9"),
        (b'1,"two\nlines \xff",b\n', 2, "text must be UTF-8, but byte 7 of the line is 0xFF"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(write, content, line, said):
    path = write(content)
    message = fault(path)
    assert message.startswith(f"{path}, line {line}: ")
    assert said in message
    assert message.endswith("correct rows.csv and start again")


def test_the_first_five_malformed_rows_are_reported_at_once(write):
    message = fault(write("9,a,b\n1,a,b\n" * 20))
    assert [f"line {line}:" in message for line in (1, 3, 5, 7, 9, 11)] == [True] * 5 + [False]


def test_rows_before_a_broken_record_are_reported_with_it(write):
    message = fault(write('9,a,b\n1,"a\n'))
    assert "line 1: the class index" in message
    assert "line 2: a quoted field" in message


@pytest.mark.parametrize("content", ["", HEADER])
def test_a_file_without_rows_is_refused(write, content):
    assert "holds no rows" in fault(write(content))


def test_a_missing_file_is_named(tmp_path):
    assert fault(tmp_path / "absent.csv").startswith(f"{tmp_path / 'absent.csv'} cannot be read (No such file")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("name", "found"), [("pipe", "something else"), ("/dev/zero", "something else"), (".", "a folder")]
)
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert fault(Path(name)) == (
        f"{name} cannot be read (it must be a regular file, but is {found}); name a CSV file of AG News"
    )


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ["&" + "amp;" * 2_490, "</b" * 2_000 + ">" * 2_000])
def test_a_text_made_to_be_cleaned_for_ever_is_cleaned_at_once(write, text):
    assert len(read_csv(write(f"1,a{text},b\n"))) == 1


@pytest.mark.skipif("AG_NEWS_DIR" not in os.environ, reason="AG_NEWS_DIR names no folder with the real AG News rows")
def test_real_rows_are_read_whole():
    rows = read_csv(Path(os.environ["AG_NEWS_DIR"], "test.csv"))
    assert len(rows) == 3800
    assert [rows.labels.count(label) for label in range(4)] == [950] * 4
