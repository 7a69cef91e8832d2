import csv
import io
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.data.cleaning import clean
from agnews_lora.data.rows import (
    MAX_CHARACTERS,
    Rows,
    TextFault,
    read_csv,
    stratified_split,
    stratified_subset,
    usable_text,
)
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
        (HEADER + "1,a,b\n2,only a title\n", 3, "a row should have 3 columns, but has 2"),
        (HEADER + "1,a,b,c\n", 2, "a row should have 3 columns, but has 4"),
        ("1,a,b\n\n2,c,d\n", 2, "a row should have 3 columns, but has 0"),
        (HEADER + "5,a,b\n", 2, "1 World, 2 Sports, 3 Business, 4 Sci/Tech, but is '5'"),
        ("1,a,b\n0,a,b\n", 2, "but is '0'"),
        ("1,a,b\nSports,a,b\n", 2, "but is 'Sports'"),
        ("label,title,text\n1,a,b\n", 1, "but is 'label' (or the header Class Index,Title,Description)"),
        ("1,a,b\n" + HEADER, 2, "but is 'Class Index'"),
        ("1,a,b\n2,,\n", 2, "has nothing visible in it after cleaning"),
        ("1,a,b\n2,&lt;b&gt;,\\\n", 2, "has nothing visible in it after cleaning"),
        ('1,"two\nlines",b\n2,"three\nmore\nlines"\n', 3, "a row should have 3 columns, but has 2"),
        ('1,a,b\n2,"never closed,c\n3,d,e\n', 2, "a quoted field is not closed"),
        ('1,a,b\n2,"closed" too early,c\n', 2, "a quoted field is not closed"),
        ("1,a,b\r2,c,d\r", 1, "a line ends in CR alone"),
        (f"1,a,b\n2,a,{'b' * 100_000}\n", 2, "has 100,002 characters, over the most that a text may have, 100,000"),
        (f"1,a,b\n2,a,{'b' * 200_000}\n", 2, "a field has more than 131,072 characters (is a quote never closed?)"),
        (b"1,a,b\n2,caf\xe9,b\n", 2, "text should be UTF-8, but byte 6 there is 0xE9"),
        (b'1,"two\nlines \xff",b\n', 2, "text should be UTF-8, but byte 7 there is 0xFF"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(write, content, line, said):
    path = write(content)
    message = fault(path)
    assert message.startswith(f"Cannot read {path}: correct these rows\n  line {line}: ")
    assert said in message


def test_the_first_five_malformed_rows_are_reported_at_once(write):
    message = fault(write("9,a,b\n1,a,b\n" * 20))
    assert [f"line {line}:" in message for line in (1, 3, 5, 7, 9, 11)] == [True] * 5 + [False]


def test_rows_before_a_broken_record_are_reported_with_it(write):
    message = fault(write('9,a,b\n1,"a\n'))
    assert "line 1: the class index" in message
    assert "line 2: in the record that starts here, a quoted field" in message


@pytest.mark.parametrize(
    ("text", "cleaning", "reason"),
    [
        ("", None, "nothing visible in it"),
        (" \n\t\x00\x1b\x85", None, "nothing visible in it"),
        ("\u200b\u2060\ufeff\u202e\u00ad\u2028", None, "nothing visible in it"),
        ("\u3164\u2800\ufe0f\u034f", None, "nothing visible in it"),
        ("&lt;br&gt;&nbsp;\u200b", "ag_news", "nothing visible in it after cleaning"),
        ("\ud83d rose", None, "half a surrogate pair"),
        ("x" * (MAX_CHARACTERS + 1), None, "100,001 characters"),
    ],
)
def test_a_text_without_anything_to_read_or_without_end_is_no_text(text, cleaning, reason):
    with pytest.raises(TextFault, match=reason):
        usable_text(text, cleaning)


@pytest.mark.parametrize(
    "text", [".", "x" * MAX_CHARACTERS, "❤\ufe0f", "नमस्ते", " two  lines\n", "&lt;br&gt;", "\ufeffx"]
)
def test_a_text_stays_as_it_is_unless_the_data_says_how_to_clean_it(text):
    assert usable_text(text, None) == text
    assert usable_text("Bush #39;s  plan", "ag_news") == "Bush's plan"


@pytest.mark.parametrize("content", ["", HEADER])
def test_a_file_without_rows_is_refused(write, content):
    assert "holds no rows" in fault(write(content))


def test_a_missing_file_is_named(tmp_path):
    assert fault(tmp_path / "absent.csv").startswith(f"Cannot read {tmp_path / 'absent.csv'}: No such file")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("name", "found"), [("pipe", "no regular file"), ("/dev/zero", "no regular file"), (".", "a folder")]
)
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert fault(Path(name)) == (f"Cannot read {name}: it is {found}. Name a CSV file of AG News.")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ["&" + "amp;" * 2_490, "</b" * 2_000 + ">" * 2_000])
def test_a_text_made_to_be_cleaned_for_ever_is_cleaned_at_once(write, text):
    assert len(read_csv(write(f"1,a{text},b\n"))) == 1


labels_lists = st.lists(st.integers(0, 3), max_size=200)
seeds = st.integers(0, 2**32)


@given(labels_lists, st.integers(0, 250), seeds)
def test_subset_keeps_each_class_within_one_row_of_its_share(labels, num_rows, seed):
    subset = stratified_subset(labels, num_rows, seed)
    assert len(subset) == min(num_rows, len(labels))
    assert subset == sorted(set(subset))
    counts, taken = Counter(labels), Counter(labels[row] for row in subset)
    for label, count in counts.items():
        assert abs(taken[label] - count * len(subset) / len(labels)) < 1


@given(labels_lists, st.integers(0, 250), seeds)
def test_split_parts_are_disjoint_and_whole(labels, num_validation, seed):
    train, validation = stratified_split(labels, num_validation, seed)
    assert len(validation) == min(num_validation, len(labels))
    assert sorted(train + validation) == list(range(len(labels)))
    assert train == sorted(train)


def test_the_seed_alone_decides():
    labels = [row % 4 for row in range(400)]
    assert stratified_split(labels, 40, seed=1) == stratified_split(labels, 40, seed=1)
    assert stratified_split(labels, 40, seed=1) != stratified_split(labels, 40, seed=2)


def test_the_split_of_a_seed_never_changes():
    # A study is resumed on the rows that it began with: this order is part of what is published.
    assert stratified_subset([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3], 5, seed=7) == [0, 2, 3, 6, 8]


def test_remainders_go_to_the_largest_fractions():
    # Of 5 from 6 + 3 + 1: 3, 1.5 and 0.5, so the remaining row goes to the lower label of the tie.
    subset = stratified_subset([0] * 6 + [1] * 3 + [2], 5, seed=0)
    assert [sum(row in part for row in subset) for part in (range(6), range(6, 9), range(9, 10))] == [3, 2, 0]


row_lists = st.lists(st.tuples(st.text(alphabet="ab\n 01", max_size=6), st.integers(0, 3)), max_size=5)


@given(row_lists, row_lists)
def test_digests_are_equal_exactly_where_rows_are(first, second):
    digests = [Rows(tuple(t for t, _ in rows), tuple(n for _, n in rows)).digest() for rows in (first, second)]
    assert (digests[0] == digests[1]) == (first == second)


@pytest.mark.skipif("AG_NEWS_DIR" not in os.environ, reason="AG_NEWS_DIR names no folder with the real AG News rows")
def test_real_rows_are_read_whole():
    rows = read_csv(Path(os.environ["AG_NEWS_DIR"], "test.csv"))
    assert len(rows) == 3800
    assert [rows.labels.count(label) for label in range(4)] == [950] * 4
